"""The artifact: one folder that is a supra model.

``config.json`` (``model_type: "supra"``) states the sizes under Hugging Face's names, the layers'
types as that ecosystem writes them, and the rest of the spec; weights are safetensors in the
canonical layout; tokenizer, generation config and a model card stand beside them. What the config
states twice for other readers is checked when it is read.
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
from supra_core.model.spec import LinearAttention, ModelSpec
from supra_core.tensors import DTYPES, LazyTensor, TensorSource, dtype_named
from supra_core.visible import visible

CONFIG = "config.json"
# The transformer's own tensors where calibrating replaced them, so that the folder still holds
# the teacher it can be uptrained with. Its name is none that other programs load.
ORIGINAL = "original.safetensors"


@dataclass(frozen=True)
class Artifact:
    """A folder that was read: its spec and its tensors under canonical names.

    ``originals``: the transformer's own, where calibrating replaced them. ``packed``: what the
    file holds where matrices are quantised; ``tensors`` are then unpacked when they are read.
    """

    spec: ModelSpec
    tensors: dict[str, LazyTensor]
    originals: dict[str, LazyTensor]
    path: Path
    dtype: str
    packed: Packed | None = None


def read(folder: str | Path) -> Artifact:
    """The model in ``folder``; every tensor's name, shape and type is checked, none is read."""
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
    """The transformer's tensors in whose place a calibrated model has its own."""
    return [
        f"{layer_prefix(index)}self_attn.o_proj.weight"
        for index, layer in enumerate(spec.layers)
        if isinstance(layer.mixer, LinearAttention)
    ]


def _originals(folder: Path, spec: ModelSpec) -> dict[str, LazyTensor]:
    """What stands in ORIGINAL; FormatError unless it is all that calibrating replaced."""
    if not has_file(folder, ORIGINAL):
        return {}
    kept, shapes = folder / ORIGINAL, tensor_shapes(spec)
    found = safetensors.read_file(kept)
    remedy = "get the file again, or delete it to do without the transformer that it is of"
    wanted = replaced_by_calibrating(spec)
    for name in sorted(found.keys() ^ set(wanted)):
        said = "is missing" if name in wanted else "is none that calibrating replaces"
        raise FormatError(f"{kept}: {name} {said}: {remedy}")
    for name, tensor in found.items():
        # Of the model's type or not: who saves it as another leaves this file as it was.
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

    ``assets``: file name -> bytes, e.g. the tokenizer's. ``originals``: what the transformer had
    in the place of calibrated tensors. ``packed``: the same model quantised, which is written in
    the place of ``tensors``. Weights are converted to ``dtype`` one
    by one; ``progress`` is called with the bytes written and the bytes in all. An existing
    ``out`` is refused unless ``force``, and then replaced once the new folder is complete.
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
    files = {mlx_file.NAME: mlx_file.text(), **transformers_files.texts()}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    card = model_card(spec, dtype, quantised=packed is not None)
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_assets(folder, assets)


def _stored(folder: Path) -> dict[str, LazyTensor]:
    """The tensors as files hold them; a run's checkpoint has its processes' parts."""
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

With PATH this folder, and only after a look at the code in it where others wrote it:

```
supra chat PATH
mlx_lm.chat --model PATH --trust-remote-code
```
"""


# What begins markup in markdown, tables and HTML.
_MARKS = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_[]<>|&~$"})


def _plain(text: str) -> str:
    """A field that a stranger may have written, as one line of markdown that is text alone."""
    return visible(text).translate(_MARKS)


def model_card(spec: ModelSpec, dtype: str, *, quantised: bool = False) -> str:
    """The folder's README.md: what the model is, where it came from and what loads it."""
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
