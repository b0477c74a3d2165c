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
from supra_core.formats.finite import converted
from supra_core.formats.inside import has_file
from supra_core.formats.jsonfile import write_object
from supra_core.formats.mlx_experts import unstacked
from supra_core.formats.pickle import checkpoint as torch_pickle
from supra_core.formats.safetensors import Progress
from supra_core.formats.tied import as_stored
from supra_core.model.layout import check_tensors
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor, TensorSource, dtype_named

# Tables that older checkpoints store, though every program computes them.
_COMPUTED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")


def read(
    folder: Path, config: dict[str, Any], where: str
) -> tuple[ModelSpec, dict[str, LazyTensor], tuple[str, ...]]:
    """The model in ``folder`` by its ``config``, read from the file ``where``.

    The last value are notes for the user, one sentence each.
    """
    spec = families.config_to_spec(config, where)
    stored = read_weights(folder)
    if stored is None:
        raise FormatError(
            f"{folder} holds no weights (neither {safetensors.SINGLE} nor {torch_pickle.SINGLE}): "
            "get the model again"
        )
    stored = {n: tensor for n, tensor in stored.items() if not n.endswith(_COMPUTED_SUFFIXES)}
    tensors = families.family_of(spec).to_canonical(spec, stored)
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

    :class:`SpecError` if the model is not one, e.g. has linear-attention layers.
    """
    config, tensors = as_transformer(spec, tensors, str(out))
    write_model(out, config, tensors, assets, force=force, dtype=dtype, progress=progress)


def write_model(
    out: str | Path,
    config: Mapping[str, Any],
    tensors: TensorSource,
    assets: Mapping[str, bytes],
    *,
    force: bool,
    dtype: str,
    progress: Progress | None,
) -> None:
    """Write a folder of ``config.json``, ``model.safetensors`` in ``dtype``, and ``assets``."""
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

    Both are made from the checked spec: no field of a source's own config gets through.
    ``where`` names the model in errors; raises as :func:`write`.
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
        # The remedy after the colon is for a conversion.
        reason = str(error).rpartition(": ")[0]
        raise FormatError(
            f"{where} cannot be run by {library} ({reason}): use another backend"
        ) from None


def weight_files(folder: Path) -> tuple[str, ...]:
    """The names of a folder's files of weights; none where it holds none."""
    for _, single, index in _KINDS:
        if has_file(folder, single):
            return (single,)
        if has_file(folder, index):
            return tuple(safetensors.shard_files(folder, index))
    return ()


def read_weights(folder: Path) -> dict[str, LazyTensor] | None:
    """The weights of a folder, safetensors before pickles; None where it holds none."""
    for read, single, index in _KINDS:
        if has_file(folder, index) or has_file(folder, single):
            return read(folder)
    return None


_KINDS = (
    (safetensors.read_folder, safetensors.SINGLE, safetensors.INDEX),
    (torch_pickle.read_folder, torch_pickle.SINGLE, torch_pickle.INDEX),
)
