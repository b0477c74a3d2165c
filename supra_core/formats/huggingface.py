"""Plain transformers in Hugging Face's layout: a config of a known family beside the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supra_core import families
from supra_core.errors import FormatError, SpecError
from supra_core.formats import checksums, safetensors
from supra_core.formats.assets import write_assets
from supra_core.formats.atomic import atomic_folder
from supra_core.formats.conversion import converted
from supra_core.formats.inside import has_file
from supra_core.formats.jsonfile import write_object
from supra_core.formats.mlx_experts import unstacked
from supra_core.formats.pickle import checkpoint as torch_pickle
from supra_core.formats.safetensors import Progress
from supra_core.formats.tied import as_stored
from supra_core.model.layout import check_tensors
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor, TensorSource, dtype_named

# Tables that older checkpoints store and every program computes.
_COMPUTED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


def read(
    folder: Path, config: dict[str, Any], where: str
) -> tuple[ModelSpec, dict[str, LazyTensor], tuple[str, ...]]:
    """The model in ``folder`` under ``config``, which stands in the file ``where``.

    Last, what the user should know of how it was read, one sentence each.
    """
    spec = families.config_to_spec(config, where)
    tensors = families.family_of(spec).to_canonical(spec, _stored(_read_weights(folder)))
    spec, tensors, notes = as_stored(spec, unstacked(spec, tensors), where)
    check_tensors(spec, {name: tensor.shape for name, tensor in tensors.items()}, str(folder))
    return spec, tensors, notes


def write(
    out: str | Path,
    spec: ModelSpec,
    tensors: TensorSource,
    assets: Mapping[str, bytes],
    *,
    force: bool = False,
    dtype: str,
    progress: Progress | None = None,
) -> None:
    """Write a plain transformer that transformers and mlx-lm load as it is.

    :class:`SpecError` if the model is none, e.g. has linear-attention layers.
    """
    config, tensors = as_transformer(spec, tensors, str(out))
    target = dtype_named(dtype)
    stored = {name: converted(name, tensor, target) for name, tensor in tensors.items()}
    with atomic_folder(out, force, holds="config.json") as folder:
        write_object(folder / "config.json", {**config, "torch_dtype": dtype})
        digests = safetensors.write_folder(folder, stored, progress=progress)
        write_assets(folder, assets)
        checksums.write(folder, digests)


def as_transformer(
    spec: ModelSpec, tensors: TensorSource, where: str
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """The config and the tensors under the names that transformers and mlx-lm know.

    Both follow from what was read and checked: no field of a source's own config is among them.
    ``where`` names the model in errors; :class:`SpecError` as :func:`write`.
    """
    config = families.spec_to_config(spec)
    check_tensors(spec, {name: tensor.shape for name, tensor in tensors.items()}, where)
    return config, families.family_of(spec).from_canonical(spec, tensors)


def for_library(
    library: str, spec: ModelSpec, tensors: TensorSource, where: str
) -> tuple[dict[str, Any], dict[str, LazyTensor]]:
    """:func:`as_transformer` for ``library``; FormatError when that has no such model."""
    try:
        return as_transformer(spec, tensors, where)
    except SpecError as error:
        # Its remedy, behind the colon, is for a conversion.
        reason = str(error).rpartition(": ")[0]
        raise FormatError(
            f"{where} cannot be run by {library} ({reason}): use another backend"
        ) from None


def weight_files(folder: Path) -> tuple[str, ...]:
    """The files that a folder's weights are read from; none where it holds none."""
    for single, index in (
        (safetensors.SINGLE, safetensors.INDEX),
        (torch_pickle.SINGLE, torch_pickle.INDEX),
    ):
        if has_file(folder, single):
            return (single,)
        if has_file(folder, index):
            return tuple(safetensors.shard_files(folder, index))
    return ()


def _read_weights(folder: Path) -> dict[str, LazyTensor]:
    if safetensors.holds_safetensors(folder):
        return safetensors.read_folder(folder)
    if torch_pickle.holds_pickles(folder):
        return torch_pickle.read_folder(folder)
    raise FormatError(
        f"{folder} holds no weights (neither {safetensors.SINGLE} nor {torch_pickle.SINGLE}): "
        "get the model again"
    )


def _stored(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {n: tensor for n, tensor in tensors.items() if not n.endswith(_COMPUTED_SUFFIXES)}
