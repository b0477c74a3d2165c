"""Folders and files in the published SUPRA layout (OpenLM), read and written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from supra_core.errors import FormatError, SpecError, SupraError
from supra_core.formats import checksums, safetensors
from supra_core.formats.assets import write_assets
from supra_core.formats.atomic import atomic_folder
from supra_core.formats.conversion import converted
from supra_core.formats.inside import file_in, files_in, has_file
from supra_core.formats.jsonfile import read_object, write_object
from supra_core.formats.openlm.config import config_to_spec, is_config, spec_to_config
from supra_core.formats.openlm.tensors import canonical_tensors, published_tensors
from supra_core.formats.pickle import checkpoint as torch_pickle
from supra_core.model.layout import check_tensors
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor, TensorSource, dtype_named


def read(path: Path, config: Path | None = None) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """The model in a folder or a single weights file, its tensors under canonical names.

    ``config`` names the OpenLM config; without it, it is the folder's ``config.json``, or the one
    ``*config.json`` beside the weights whose shapes match them.
    """
    weights = _weights_in(path) if path.is_dir() else _weights_file(path)
    if config is not None:
        return _model(read_object(config), config, weights(), str(path))
    folder = path if path.is_dir() else path.parent
    if has_file(folder, "config.json"):
        beside = folder / "config.json"
        return _model(read_object(beside), beside, weights(), str(path))
    tensors = weights()
    candidates = config_files(folder)
    models = [model for found in candidates if (model := _try_model(found, tensors, str(path)))]
    if len(models) == 1:
        return models[0]
    found = "no OpenLM config matches" if not models else "more than one OpenLM config matches"
    raise FormatError(f"{path}: {found} these weights in {folder}: name the config explicitly")


def write(
    out: str | Path,
    spec: ModelSpec,
    tensors: TensorSource,
    assets: Mapping[str, bytes],
    *,
    force: bool = False,
    dtype: str,
    progress: safetensors.Progress | None = None,
) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``assets`` in the published layout."""
    config = spec_to_config(spec)
    check_tensors(spec, {name: tensor.shape for name, tensor in tensors.items()}, str(out))
    target = dtype_named(dtype)
    stored = {
        name: converted(name, tensor, target)
        for name, tensor in published_tensors(spec, tensors).items()
    }
    with atomic_folder(out, force, holds="config.json") as folder:
        write_object(folder / "config.json", {**config, "torch_dtype": dtype})
        digests = safetensors.write_folder(folder, stored, progress=progress)
        write_assets(folder, assets)
        checksums.write(folder, digests)


def config_files(folder: Path) -> list[Path]:
    """The files ``*config.json`` in ``folder`` that are OpenLM configs."""
    return [path for path in files_in(folder, "*config.json") if _is_config_file(path)]


def _model(
    config: dict[str, Any], config_path: Path, tensors: dict[str, LazyTensor], where: str
) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    if not is_config(config):
        raise SpecError(
            f"{config_path} is no OpenLM config (no hidden_dim or dim beside n_heads): name the "
            "config that belongs to these weights"
        )
    spec = config_to_spec(config, str(config_path))
    return spec, canonical_tensors(spec, tensors, where)


def _try_model(
    config_path: Path, tensors: dict[str, LazyTensor], where: str
) -> tuple[ModelSpec, dict[str, LazyTensor]] | None:
    try:
        return _model(read_object(config_path), config_path, tensors, where)
    except SupraError:
        return None


def _is_config_file(path: Path) -> bool:
    try:
        return is_config(read_object(path))
    except SupraError:
        return False


def _weights_file(path: Path) -> Callable[[], dict[str, LazyTensor]]:
    if path.suffix == ".safetensors":
        return lambda: safetensors.read_file(path)
    return lambda: torch_pickle.state_dict(path)


def _weights_in(folder: Path) -> Callable[[], dict[str, LazyTensor]]:
    if safetensors.holds_safetensors(folder):
        return lambda: safetensors.read_folder(folder)
    if torch_pickle.holds_pickles(folder):
        return lambda: torch_pickle.read_folder(folder)
    checkpoints = list(files_in(folder, "*.pt"))
    if has_file(folder, "checkpoint.pt"):
        checkpoints = [file_in(folder, "checkpoint.pt")]
    if len(checkpoints) == 1:
        return lambda: torch_pickle.state_dict(checkpoints[0])
    raise FormatError(
        f"{folder} holds no weights, or several checkpoints: name the .pt or .safetensors file"
    )
