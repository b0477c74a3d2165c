"""The transformer that a model was made from, where it is still on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from supra_core.errors import SupraError
from supra_core.formats.jsonfile import read_object
from supra_core.model.layout import tensor_shapes
from supra_core.model.original import original_spec
from supra_core.model.spec import ModelSpec
from supra_core.sources.source import RUN_FILE, Source, is_cached, open_source
from supra_core.tensors import TensorSource


def find_teacher(model: str | Path) -> str | None:
    """The teacher an uptraining run names, or the source an artifact states.

    A source's name alone is kept: it is looked for beside the model, in the current directory and
    in the hub's cache, and only a transformer of the model's layers, channels and vocabulary is
    taken for it. None if it is unknown or not here; a transformer has none.
    """
    # Of a relative path like "." the parent would be the folder itself.
    folder = Path(os.path.abspath(model) if os.path.exists(model) else model)
    for run in (folder, folder.parent):
        if os.path.isfile(run / RUN_FILE):
            return _of_run(read_object(run / RUN_FILE))
    spec = open_source(model).spec
    if spec.is_transformer:
        return None
    stated = spec.provenance.source
    return _first_teacher([str(folder.parent / stated), stated], spec) if stated else None


def open_teacher(path: str) -> Source:
    """The transformer at ``path``; SupraError for a model that is not one."""
    source = open_source(path)
    if not source.spec.is_transformer:
        raise SupraError(f"{path} is not a transformer: name the original as the teacher")
    return source


def holds_original(model: Source) -> bool:
    """Whether the model is freshly converted: the transformer's own weights are still there."""
    spec = model.spec
    folded = any(mixer.folded for mixer in spec.mixers)
    if spec.provenance.calibration_tokens and not model.originals:
        return False
    return not folded and not spec.provenance.trained_tokens and bool(spec.provenance.recipe)


def original(model: Source) -> tuple[ModelSpec, TensorSource]:
    """The transformer inside a freshly converted model; see :func:`holds_original`."""
    spec = original_spec(model.spec)
    tensors = {**model.tensors, **model.originals}
    return spec, {name: tensors[name] for name in tensor_shapes(spec)}


def _of_run(record: dict[str, Any]) -> str | None:
    named = record.get("teacher")
    if not isinstance(named, str) or not _is_here(named):
        return None
    # A run may learn from the transformer inside a freshly converted model.
    return named if _is_transformer(named) else find_teacher(named)


def _first_teacher(places: list[str], student: ModelSpec) -> str | None:
    return next((place for place in places if _is_here(place) and _fits(place, student)), None)


def _is_here(place: str) -> bool:
    return os.path.exists(place) or is_cached(place)


def _is_transformer(place: str) -> bool:
    spec = _spec(place)
    return spec is not None and spec.is_transformer


def _fits(place: str, student: ModelSpec) -> bool:
    """Whether a transformer stands there that the model can be made of: others share its name."""
    spec = _spec(place)
    return spec is not None and spec.is_transformer and _shape(spec) == _shape(student)


def _shape(spec: ModelSpec) -> tuple[int, int, int]:
    return spec.num_hidden_layers, spec.hidden_size, spec.vocab_size


def _spec(place: str) -> ModelSpec | None:
    try:
        return open_source(place).spec
    except SupraError:
        return None
