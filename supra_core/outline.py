"""What a model is, without its weights: of a config alone, or of whatever holds a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from supra_core import config as artifact_config
from supra_core import families
from supra_core.errors import SupraError
from supra_core.formats import openlm_config
from supra_core.formats.jsonfile import read_object
from supra_core.sources import CONFIG, is_hub_id, open_source, reason_of
from supra_core.spec import ModelSpec


def outline(path: str | Path) -> ModelSpec:
    """The spec of a model, of a folder that holds its config alone, or of a ``config.json``.

    Of a hub id, nothing but the config is downloaded. Raises SupraError as
    :func:`~supra_core.sources.open_source` does.
    """
    place = Path(path)
    if not place.exists() and is_hub_id(str(path)):
        spec = _stated(_downloaded(str(path)))
        return replace(spec, provenance=replace(spec.provenance, source=str(path)))
    if place.suffix == ".json" and place.is_file():
        return _stated(place)
    if place.is_dir() and {file.name for file in place.iterdir()} == {CONFIG}:
        return _stated(place / CONFIG)
    return open_source(path).spec


def _stated(file: Path) -> ModelSpec:
    config: dict[str, Any] = read_object(file)
    if config.get("model_type") == artifact_config.MODEL_TYPE:
        return artifact_config.config_to_spec(config, str(file))
    if openlm_config.is_config(config):
        return openlm_config.config_to_spec(config, str(file))
    return families.config_to_spec(config, str(file))


def _downloaded(hub_id: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, CONFIG))
    except Exception as error:  # Offline, no such id, no access: each has its own type there.
        raise SupraError(
            f"the config of {hub_id} cannot be had from the hub ({reason_of(error)}): check the "
            "id and the network, or name a config.json"
        ) from None
