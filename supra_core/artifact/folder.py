"""The artifact: one folder that is a supra model.

``config.json`` (``model_type: "supra"``) states the sizes and layer types as Hugging Face does, and
the rest of the spec. Weights are safetensors in the canonical layout, with the tokenizer, the
generation config and a model card beside them. Reading checks what the config states twice for
other readers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from supra_core.artifact import mlx_file, transformers_files
from supra_core.artifact.config import config_to_spec, spec_to_config
from supra_core.errors import FormatError
from supra_core.families.shared.fields import Fields
from supra_core.formats import checksums, distributed, safetensors
from supra_core.formats.assets import write_assets
from supra_core.formats.atomic import atomic_folder
from supra_core.formats.finite import converted
from supra_core.formats.inside import file_in, has_file
from supra_core.formats.jsonfile import read_object, write_object
from supra_core.formats.mlx_experts import unstacked
from supra_core.formats.mlx_quantized import Packed, read_packed, unpacked
from supra_core.formats.safetensors import Progress
from supra_core.hub.identity import hub_id
from supra_core.model.layout import (
    FLOAT32_SUFFIXES,
    check_tensors,
    layer_prefix,
    parameter_count,
    tensor_shapes,
)
from supra_core.model.original import left_out
from supra_core.model.spec import ModelSpec
from supra_core.tensors import DTYPES, LazyTensor, TensorSource, dtype_named
from supra_core.visible import visible

CONFIG = "config.json"
# The transformer's tensors that calibration replaced, so that the folder still contains the
# teacher to uptrain with. Other programs do not load a file of this name.
ORIGINAL = "original.safetensors"


@dataclass(frozen=True)
class Artifact:
    """An artifact: its spec and its tensors under canonical names.

    ``originals``: the transformer's tensors that calibration replaced. ``packed``: the stored
    tensors if matrices are quantised; ``tensors`` are then unpacked when they are read.
    """

    spec: ModelSpec
    tensors: dict[str, LazyTensor]
    originals: dict[str, LazyTensor]
    path: Path
    dtype: str
    packed: Packed | None = None


def read(folder: str | Path) -> Artifact:
    """The model in ``folder``: checks every tensor's name, shape and type, and reads none."""
    folder = Path(folder)
    config_path = file_in(folder, CONFIG)
    config = read_object(config_path)
    spec = config_to_spec(config, str(config_path))
    fields = Fields(config, str(config_path))
    dtype = fields.text("torch_dtype", "dtype")
    if dtype not in DTYPES:
        raise fields.error(f"field torch_dtype is '{dtype}': known are {', '.join(DTYPES)}")
    tensors, packed = unstacked(spec, _stored(folder)), None
    if config.get("quantization") is not None:
        packed = read_packed(tensors, config["quantization"], str(config_path))
        tensors = unpacked(packed)
    check_tensors(spec, {name: tensor.shape for name, tensor in tensors.items()}, str(folder))
    for name, tensor in tensors.items():
        if tensor.dtype != stored_dtype(name, dtype):
            raise FormatError(
                f"{folder}: {name} is {tensor.dtype}, but {CONFIG} states {dtype}: convert the "
                "model again"
            )
    return Artifact(spec, tensors, _originals(folder, spec), folder, dtype, packed)


def replaced_by_calibrating(spec: ModelSpec) -> list[str]:
    """The names of the transformer's tensors that calibration replaces."""
    return [
        f"{layer_prefix(index)}self_attn.o_proj.weight"
        for index, layer in enumerate(spec.layers)
        if layer.mixer.can_calibrate
    ]


def _originals(folder: Path, spec: ModelSpec) -> dict[str, LazyTensor]:
    """The tensors in ORIGINAL; FormatError unless they are those that calibration replaced."""
    if not has_file(folder, ORIGINAL):
        return {}
    kept, shapes = folder / ORIGINAL, tensor_shapes(spec)
    found = safetensors.read_file(kept)
    remedy = "get the file again, or delete it, which removes the teacher from the folder"
    wanted = replaced_by_calibrating(spec)
    for name in sorted(found.keys() ^ set(wanted)):
        said = "is missing" if name in wanted else "is not one that calibration replaces"
        raise FormatError(f"{kept}: {name} {said}: {remedy}")
    for name, tensor in found.items():
        # Its type may differ: transformers saves the model in another type without this file.
        if tensor.shape != shapes[name] or tensor.dtype not in DTYPES.values():
            raise FormatError(
                f"{kept}: {name} is {tensor.dtype} {list(tensor.shape)}, not {', '.join(DTYPES)} "
                f"{list(shapes[name])}: {remedy}"
            )
    return found


def write(
    out: str | Path,
    spec: ModelSpec,
    tensors: TensorSource,
    assets: Mapping[str, bytes],
    *,
    force: bool = False,
    dtype: str,
    originals: TensorSource | None = None,
    packed: Packed | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the artifact folder ``out``, whole or not at all.

    ``assets``: file name -> bytes, such as the tokenizer. ``originals``: the transformer's tensors
    that calibration replaced. ``packed``: the model quantised, written instead of ``tensors``.
    Weights are converted to ``dtype`` one by one; ``progress`` gets the bytes written and the bytes
    in all. SupraError if ``out`` exists; with ``force`` the complete new folder replaces it.
    """
    check_tensors(spec, {name: tensor.shape for name, tensor in tensors.items()}, str(out))
    stored = _converted(tensors, dtype) if packed is None else packed.tensors
    with atomic_folder(out, force, holds=CONFIG) as folder:
        digests = safetensors.write_folder(folder, stored, progress=progress)
        if originals:
            kept = folder / ORIGINAL
            digests[ORIGINAL] = safetensors.write_file(kept, _converted(originals, dtype))
        write_without_weights(folder, spec, assets, dtype=dtype, packed=packed)
        checksums.write(folder, digests)


def write_without_weights(
    folder: Path,
    spec: ModelSpec,
    assets: Mapping[str, bytes],
    *,
    dtype: str,
    packed: Packed | None = None,
) -> None:
    """Everything but the weights, into an existing folder; see :func:`write`."""
    config = {**spec_to_config(spec, dtype), "model_file": mlx_file.NAME}
    config["auto_map"] = dict(transformers_files.AUTO_MAP)
    if packed is not None:
        config["quantization"] = packed.config()
    write_object(folder / CONFIG, config)
    files = {file.NAME: file.text() for file in (mlx_file, transformers_files)}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    card = model_card(spec, dtype, quantised=packed is not None)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_assets(folder, assets)


def _stored(folder: Path) -> dict[str, LazyTensor]:
    """The tensors as stored; the checkpoint of a run may be in parts, one a process."""
    if distributed.holds_shards(folder):
        return distributed.read_folder(folder)
    return safetensors.read_folder(folder)


def _converted(tensors: TensorSource, dtype: str) -> dict[str, LazyTensor]:
    return {
        name: converted(name, tensor, stored_dtype(name, dtype)) for name, tensor in tensors.items()
    }


def stored_dtype(name: str, dtype: str) -> np.dtype[np.generic]:
    """The type tensor ``name`` has in an artifact of type ``dtype``."""
    return DTYPES["float32"] if name.endswith(FLOAT32_SUFFIXES) else dtype_named(dtype)


_FOR_TRANSFORMERS = """
```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("PATH", trust_remote_code=True)
```
"""
_USE = """## Use

Replace PATH with this folder. Programs other than supra run code from it: review it first if you
did not create it.

```
supra chat PATH
mlx_lm.chat --model PATH --trust-remote-code
```
"""


# Characters that begin markup in markdown, tables and HTML.
_MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>|&~$"})


def _plain(text: str) -> str:
    """A field of a stranger as one line of markdown without markup."""
    return visible(text).translate(_MARKS)


def model_card(spec: ModelSpec, dtype: str, *, quantised: bool = False) -> str:
    """The folder's README.md: what the model is, where it comes from and how to load it."""
    kinds = [layer.mixer.layer_type for layer in spec.layers]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    origin = spec.provenance
    model = hub_id(origin.source)
    title = origin.source if model is None else model.name
    rows = {
        "Source": _plain(title) or "not stated",
        **({"Revision of the source": _plain(model.revision)} if model and model.revision else {}),
        "Source family": _plain(origin.family) or "not stated",
        "Recipe": _plain(origin.recipe) or "none (converted as it was)",
        "Tokens calibrated on": f"{origin.calibration_tokens:,}",
        "Tokens trained after conversion": f"{origin.trained_tokens:,}",
        "Parameters": f"{parameter_count(spec):,}",
        "Layers": counts,
        "Weights": dtype,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    without = "\n".join(f"- {sentence}" for sentence in left_out(spec))
    section = f"## Left out\n\n{without}\n\n" if without else ""
    base = "" if model is None else f"base_model: {model.name}\n"
    return (
        "---\nlibrary_name: supra\npipeline_tag: text-generation\n"
        f"{base}tags:\n- supra\n---\n\n"
        f"# {_plain(title) or 'A supra model'}\n\n"
        "Converted with supra. The terms of the source "
        "model's licence apply.\n\n"
        f"| | |\n|---|---|\n{table}\n\n{section}"
        f"{_USE}{'' if quantised else _FOR_TRANSFORMERS}\n"
        "## Quality\n\nNot measured yet: `supra eval` measures it.\n"
    )
