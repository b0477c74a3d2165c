"""The spec of a model: from its config alone, or from any source."""

from __future__ import annotations

import os
from contextlib import suppress
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
    """The spec of a model, of a folder with nothing but a config, or of a ``config.json``.

    Of a hub id, only the config is downloaded. Raises as
    :func:`~supra_core.sources.source.open_source`.
    """
    place = Path(path)
    model = None if os.path.exists(place) else hub_id(str(path))
    if model is not None:
        spec = _stated(download_config(model))
        return replace(spec, provenance=replace(spec.provenance, source=str(path)))
    if place.suffix == ".json" and os.path.isfile(place):
        return _stated(place)
    # open_source reports a folder that cannot be read.
    with suppress(OSError):
        if os.listdir(place) == [CONFIG]:
            return _stated(place / CONFIG)
    return open_source(path).spec


def _stated(file: Path) -> ModelSpec:
    config: dict[str, Any] = read_object(file)
    if config.get("model_type") == artifact_config.MODEL_TYPE:
        return artifact_config.config_to_spec(config, str(file))
    if openlm_config.is_config(config):
        return openlm_config.config_to_spec(config, str(file))
    return families.config_to_spec(config, str(file))
