"""Folders and files in the published SUPRA layout (OpenLM), read and written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from supra_core.errors import FormatError, SpecError, SupraError
from supra_core.formats import safetensors
from supra_core.formats.huggingface import read_weights, write_model
from supra_core.formats.inside import file_in, files_in, has_file
from supra_core.formats.jsonfile import read_object
from supra_core.formats.openlm.config import config_to_spec, is_config, spec_to_config
from supra_core.formats.openlm.tensors import canonical_tensors, published_tensors
from supra_core.formats.pickle import checkpoint as torch_pickle
from supra_core.formats.safetensors import Progress
from supra_core.model.layout import check_tensors
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor, TensorSource


def read(path: Path, config: Path | None = None) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """The model in a folder or a single weights file, its tensors under canonical names.

    ``config`` names the OpenLM config; without it, it is the folder's ``config.json``, or the one
    ``*config.json`` beside the weights whose shapes match them.
    """
    folder = path if path.is_dir() else path.parent
    if config is None and has_file(folder, "config.json"):
        config = folder / "config.json"
    # The config is read first: it is small, and says more if it is wrong.
    stated = None if config is None else read_object(config)
    tensors = _weights_in(path) if path.is_dir() else _weights_file(path)
    if config is not None and stated is not None:
        return _model(stated, config, tensors, str(path))
    models = []
    for candidate in config_files(folder):
        with suppress(SupraError):
            models.append(_model(read_object(candidate), candidate, tensors, str(path)))
    if len(models) == 1:
        return models[0]
    found = "more than one OpenLM config matches" if models else "no OpenLM config matches"
    raise FormatError(f"{path}: {found} these weights in {folder}: name the config explicitly")


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
    """Write ``config.json``, ``model.safetensors`` and ``assets`` in the published layout."""
    config = spec_to_config(spec)
    check_tensors(spec, {name: tensor.shape for name, tensor in tensors.items()}, str(out))
    stored = published_tensors(spec, tensors)
    write_model(out, config, stored, assets, force=force, dtype=dtype, progress=progress)


def config_files(folder: Path) -> list[Path]:
    """The files ``*config.json`` in ``folder`` that are OpenLM configs."""
    return [path for path in files_in(folder, "*config.json") if _is_config_file(path)]


def _model(
    config: dict[str, Any], config_path: Path, tensors: dict[str, LazyTensor], where: str
) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    if not is_config(config):
        raise SpecError(
            f"{config_path} is not an OpenLM config (without n_heads, and dim or hidden_dim): name "
            "the config that belongs to these weights"
        )
    spec = config_to_spec(config, str(config_path))
    return spec, canonical_tensors(spec, tensors, where)


def _is_config_file(path: Path) -> bool:
    try:
        return is_config(read_object(path))
    except SupraError:
        return False


def _weights_file(path: Path) -> dict[str, LazyTensor]:
    read = safetensors.read_file if path.suffix == ".safetensors" else torch_pickle.state_dict
    return read(path)


def _weights_in(folder: Path) -> dict[str, LazyTensor]:
    if (tensors := read_weights(folder)) is not None:
        return tensors
    checkpoints = list(files_in(folder, "*.pt"))
    if has_file(folder, "checkpoint.pt"):
        checkpoints = [file_in(folder, "checkpoint.pt")]
    if len(checkpoints) == 1:
        return torch_pickle.state_dict(checkpoints[0])
    raise FormatError(
        f"{folder} holds no weights, or several checkpoints: name the .pt or .safetensors file"
    )
