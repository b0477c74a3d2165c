"""What a model is, without its weights: of a config alone, or of whatever holds a model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from supra_core import families
from supra_core.artifact import config as artifact_config
from supra_core.formats.jsonfile import read_object
from supra_core.formats.openlm import config as openlm_config
from supra_core.hub import download_config, hub_id
from supra_core.model.spec import ModelSpec
from supra_core.sources.source import CONFIG, open_source


def outline(path: str | Path) -> ModelSpec:
    """The spec of a model, of a folder that holds its config alone, or of a ``config.json``.

    Of a hub id, nothing but the config is downloaded. Raises SupraError as
    :func:`~supra_core.sources.source.open_source` does.
    """
    place = Path(path)
    model = None if os.path.exists(place) else hub_id(str(path))
    if model is not None:
        spec = _stated(download_config(model))
        return replace(spec, provenance=replace(spec.provenance, source=str(path)))
    if place.suffix == ".json" and os.path.isfile(place):
        return _stated(place)
    if _is_config_alone(place):
        return _stated(place / CONFIG)
    return open_source(path).spec


def _is_config_alone(place: Path) -> bool:
    try:
        return os.listdir(place) == [CONFIG]
    except OSError:
        # No folder, or none that can be read, which whoever opens it says.
        return False


def _stated(file: Path) -> ModelSpec:
    config: dict[str, Any] = read_object(file)
    if config.get("model_type") == artifact_config.MODEL_TYPE:
        return artifact_config.config_to_spec(config, str(file))
    if openlm_config.is_config(config):
        return openlm_config.config_to_spec(config, str(file))
    return families.config_to_spec(config, str(file))
