"""The whole record of a report: both models' results side by side, and what compares them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from supra_cli.evaluation.figures import memory
from supra_cli.evaluation.sides import Side
from supra_cli.report_card.inputs import Inputs, origin
from supra_cli.report_card.settings import ReportSettings
from supra_cli.report_card.sides import SideMeasurement, quality_record, timed
from supra_cli.shared.backends import require
from supra_core.artifact import folder as artifact
from supra_core.conversion.variants import is_windowed, window_alone, without_window
from supra_core.errors import SupraError
from supra_core.measure.tasks import Options, Record
from supra_core.model import sizes
from supra_core.progress import Progress
from supra_core.runtime.backend import Backend

MEMORY_CONTEXTS = tuple(2**power for power in range(9, 18))
LAYER_SEQUENCE = 512


def measure(settings: ReportSettings, inputs: Inputs, progress: Progress) -> Record:
    """Everything the report says, JSON-ready; origin and seconds are the caller's."""
    budget = settings.budget
    found = {
        side.role: SideMeasurement(side, inputs, budget, settings.seed, progress).all()
        for side in inputs.sides
    }
    student, teacher = found["student"], found.get("teacher")
    record: Record = {
        "model": _described(inputs.student),
        "teacher": inputs.teacher and _described(inputs.teacher),
        "settings": {
            "seed": settings.seed, "quick": settings.quick, "limit": settings.limit,
            **asdict(budget),
        },
        "data": [
            {"name": file.name, "task": file.task.name, **origin(file)} for file in inputs.files
        ],
        **{name: {"student": ours, "teacher": teacher and teacher[name]}
           for name, ours in student.items()},
        "quality": _quality(student["quality"], teacher and teacher["quality"]),
    }  # fmt: skip
    sections: dict[str, Callable[[], Record]] = {
        "training": lambda: _training(inputs),
        "layer_errors": lambda: _layer_errors(inputs, budget.layer_tokens, progress),
        "variants": lambda: _variants(inputs, budget.variant_tokens, settings.out.parent, progress),
        "memory": lambda: _memory(inputs.student),
    }
    return {**record, **{name: timed(work) for name, work in sections.items()}}


def _described(side: Side) -> Record:
    spec = side.source.spec
    kinds = [layer.mixer.layer_type for layer in spec.layers]
    return {
        "path": side.path,
        "kind": side.source.kind,
        "backend": side.backend,
        "form": side.form,
        "dtype": side.dtype,
        "stored_dtype": side.source.dtype,
        "parameters": sizes.measure(spec, side.source.tensors).parameters,
        "layers": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "windows": sorted({layer.mixer.window or 0 for layer in spec.layers}),
        "max_position_embeddings": spec.max_position_embeddings,
        **asdict(spec.provenance),
    }


def _quality(student: Record, teacher: Record | None) -> Record:
    """File by file; ``ratio``: the student's perplexity over the teacher's of the same tokens."""
    files = {}
    for name, ours in student["files"].items():
        theirs = teacher and teacher["files"][name]
        values = [(side or {}).get("perplexity") for side in (ours, theirs)]
        alike = (theirs or {}).get("same_tokens", True)
        ratio = values[0] / values[1] if alike and values[0] is not None and values[1] else None
        files[name] = {"task": ours["task"], "student": ours, "teacher": theirs, "ratio": ratio}
    seconds = {"student": student["seconds"], "teacher": teacher and teacher["seconds"]}
    return {"files": files, "seconds": seconds}


def _training(inputs: Inputs) -> Record:
    if inputs.curve is None:
        raise SupraError("the model was not given as an uptraining run")
    if not inputs.curve["stages"]:
        raise SupraError("the run has logged no step")
    return inputs.curve


def _layer_errors(inputs: Inputs, tokens: int, progress: Progress) -> Record:
    """Measured in torch whatever the report's backend is: only there the layers are open."""
    if inputs.teacher is None:
        raise SupraError("there is no teacher to compare with: name one with --teacher")
    require("torch", "the error of each layer")
    from supra_torch.inference.backend import load as load_in_torch
    from supra_torch.uptrain.layer_errors import layer_errors

    text, tokenizer = inputs.text(), inputs.teacher.tokenizer
    ids = tokenizer.encode(text.content).ids[:tokens]
    length = min(LAYER_SEQUENCE, len(ids))
    rows = tokenizer.rows(ids, length)
    student, teacher = (
        load_in_torch(side.source.path, dtype=side.dtype).model for side in inputs.sides
    )
    found = layer_errors(student, teacher, rows, progress=progress)
    if not found:
        raise SupraError("no layer of the model is linear attention")
    return {
        "text": text.name,
        "sequences": len(rows),
        "length": length,
        "layers": [asdict(one) for one in found],
        "mean": sum(one.error for one in found) / len(found),
    }


def _variants(inputs: Inputs, tokens: int, beside: Path, progress: Progress) -> Record:
    """A windowed model whole, without its window, and with its window alone.

    The other two stand in ``beside`` while they are measured.
    """
    side = inputs.student
    spec, tensors, dtype = side.source.spec, side.source.tensors, side.source.dtype
    if not is_windowed(spec):
        raise SupraError("no layer of the model has linear attention with a window")
    text = inputs.text()
    perplexity = side.prepared(text, Options(tokens))

    def measured(name: str, model: Backend) -> Record:
        return quality_record(side, "perplexity", perplexity(model, progress, side.stage(name)))

    results: Record = {"text": text.name, "whole": measured("whole", side.load())}
    for name, variant in (("without_window", without_window), ("window_alone", window_alone)):
        # Through a folder, since that is what every backend loads.
        with tempfile.TemporaryDirectory(dir=beside) as place:
            folder = Path(place) / name
            artifact.write(folder, *variant(spec, tensors), {}, dtype=dtype)
            found = measured(name, replace(side, path=str(folder)).load())
        results[name] = {**found, "ratio": found["perplexity"] / results["whole"]["perplexity"]}
    return results


def _memory(student: Side) -> Record:
    found = sizes.measure(student.source.spec, student.source.tensors)
    return {
        "state_bytes": found.state_bytes,
        "growing_bytes_per_token": found.growing_bytes_per_token,
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "transformer_windows": list(found.transformer_windows),
        "break_even_tokens": found.break_even_tokens,
        "contexts": memory(found, MEMORY_CONTEXTS, "student"),
    }
