"""The transformer that a model was made from, if it is on this machine."""

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

    An artifact states a name alone: it is looked for beside the model, in the current directory
    and in the hub's cache, and must be a transformer with the model's layers, channels and
    vocabulary. None if it is unknown or not here; a transformer has none.
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
    places = [str(folder.parent / stated), stated] if stated else []
    return next((place for place in places if _is_teacher(place, spec)), None)


def open_teacher(path: str, student: ModelSpec | None = None, student_name: str = "") -> Source:
    """The transformer at ``path``, from which ``student`` can have been made; else SupraError."""
    source = open_source(path)
    if not source.spec.is_transformer:
        raise SupraError(f"{path} is not a transformer: name the original as the teacher")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers") if student else ():
        if getattr(source.spec, name) != getattr(student, name):
            raise SupraError(
                f"{path} has another {name} than {student_name}: name the transformer it was "
                "converted from as teacher"
            )
    return source


def holds_original(model: Source) -> bool:
    """Whether the model is freshly converted, so that it still has the transformer's weights."""
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
    return named if _is_teacher(named) else find_teacher(named)


def _is_here(place: str) -> bool:
    return os.path.exists(place) or is_cached(place)


def _is_teacher(place: str, student: ModelSpec | None = None) -> bool:
    """Whether ``place`` is a transformer that fits ``student``: others may share its name."""
    try:
        return _is_here(place) and bool(open_teacher(place, student))
    except SupraError:
        return False
