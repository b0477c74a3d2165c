"""The whole record of a report: both models' results side by side, and what compares them."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from supra_cli.report_card.inputs import Inputs, Side
from supra_cli.report_card.settings import Budget, ReportSettings
from supra_cli.report_card.sides import Result, SideMeasurement, failed, not_measured, text_result
from supra_core.artifact import folder as artifact
from supra_core.conversion.variants import is_windowed, window_alone, without_window
from supra_core.model import sizes
from supra_core.progress import Progress
from supra_core.runtime.backend import load

MEMORY_CONTEXTS = tuple(2**power for power in range(9, 18))
LAYER_SEQUENCE = 512


def measure(settings: ReportSettings, inputs: Inputs, progress: Progress) -> Result:
    """Everything the report says, JSON-ready; origin and seconds are the caller's."""
    budget = settings.budget
    found = {
        side.role: SideMeasurement(side, inputs, budget, settings.seed, progress).all()
        for side in inputs.sides
    }
    student, teacher = found["student"], found.get("teacher")
    record: Result = {
        "model": _described(inputs.student),
        "teacher": None if inputs.teacher is None else _described(inputs.teacher),
        "settings": {
            "seed": settings.seed, "quick": settings.quick, "limit": settings.limit,
            **asdict(budget),
        },
        "data": [
            {"name": file.name, "task": file.task, **file.origin} for file in inputs.files
        ],
        "quality": _quality(student["quality"], teacher and teacher["quality"]),
        "training": _training(inputs),
    }  # fmt: skip
    for name in ("positions", "recall", "copying", "permutations", "samples", "speed"):
        record[name] = {"student": student[name], "teacher": teacher and teacher[name]}
    sections: dict[str, Callable[[], Result]] = {
        "layer_errors": lambda: _layer_errors(inputs, budget, progress),
        "variants": lambda: _variants(inputs, budget, settings.out.parent, progress),
        "memory": lambda: _memory(inputs.student),
    }
    for name, work in sections.items():
        start = time.monotonic()
        try:
            record[name] = work()
        # What was measured before it is not lost for it.
        except Exception as error:
            record[name] = failed(error)
        record[name]["seconds"] = round(time.monotonic() - start, 1)
    return record


def _described(side: Side) -> Result:
    spec = side.source.spec
    kinds = [layer.mixer.layer_type for layer in spec.layers]
    measured = sizes.measure(spec, side.source.tensors)
    return {
        "path": side.path,
        "kind": side.source.kind,
        "backend": side.backend,
        "form": side.form,
        "dtype": side.dtype,
        "stored_dtype": side.source.dtype,
        "parameters": measured.parameters,
        "layers": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "windows": sorted({layer.mixer.window or 0 for layer in spec.layers}),
        "max_position_embeddings": spec.max_position_embeddings,
        **asdict(spec.provenance),
    }


def _quality(student: Result, teacher: Result | None) -> Result:
    """File by file; ``ratio``: the student's perplexity over the teacher's of the same tokens."""
    seconds = {"student": student["seconds"], "teacher": teacher and teacher["seconds"]}
    files = {}
    for name, ours in student["files"].items():
        theirs = None if teacher is None else teacher["files"][name]
        values = [_perplexity(result) for result in (ours, theirs)]
        alike = theirs is None or theirs.get("same_tokens", True)
        ratio = values[0] / values[1] if alike and values[0] is not None and values[1] else None
        files[name] = {"task": ours["task"], "student": ours, "teacher": theirs, "ratio": ratio}
    return {"files": files, "seconds": seconds}


def _perplexity(result: Result | None) -> float | None:
    if result is None:
        return None
    value: float | None = result.get("perplexity", result.get("metrics", {}).get("perplexity"))
    return value


def _training(inputs: Inputs) -> Result:
    if inputs.curve is None:
        return not_measured("the model was not given as an uptraining run")
    if not inputs.curve.stages:
        return not_measured("the run has logged no step")
    return asdict(inputs.curve)


def _layer_errors(inputs: Inputs, budget: Budget, progress: Progress) -> Result:
    """Measured in torch whatever the report's backend is: only there the layers are open."""
    if inputs.teacher is None:
        return not_measured("there is no teacher to compare with: name one with --teacher")
    if importlib.util.find_spec("torch") is None:
        return not_measured("it needs torch: install it with pip install 'supra-lm[torch]'")
    if inputs.text is None or not isinstance(inputs.text.content, str):
        return not_measured("none of the files is a text: name one with --data")
    from supra_torch.inference.backend import load as load_in_torch
    from supra_torch.uptrain.layer_errors import layer_errors

    tokenizer = inputs.teacher.tokenizer
    ids = tokenizer.encode(inputs.text.content).ids[: budget.layer_tokens]
    length = min(LAYER_SEQUENCE, len(ids))
    rows = tokenizer.rows(ids, length)
    student, teacher = (
        load_in_torch(side.source.path, dtype=side.dtype).model for side in inputs.sides
    )
    found = layer_errors(student, teacher, rows, progress=progress)
    if not found:
        return not_measured("no layer of the model is linear attention")
    return {
        "text": inputs.text.name,
        "sequences": len(rows),
        "length": length,
        "layers": [asdict(one) for one in found],
        "mean": sum(one.error for one in found) / len(found),
    }


def _variants(inputs: Inputs, budget: Budget, beside: Path, progress: Progress) -> Result:
    """A windowed model whole, without its window, and with its window alone.

    The other two stand in ``beside`` while they are measured.
    """
    side = inputs.student
    if not is_windowed(side.source.spec):
        return not_measured("no layer of the model has linear attention with a window")
    if inputs.text is None or not isinstance(inputs.text.content, str):
        return not_measured("none of the files is a text: name one with --data")
    text = side.tokenizer.encode(inputs.text.content).head(budget.variant_tokens)
    results: Result = {"text": inputs.text.name}
    whole = load(side.backend, side.path, dtype=side.dtype)
    results["whole"] = text_result(whole, side, text, progress, "student: whole")
    del whole
    for name, variant in (("without_window", without_window), ("window_alone", window_alone)):
        spec, tensors = variant(side.source.spec, side.source.tensors)
        # Through a folder, since that is what every backend loads.
        with tempfile.TemporaryDirectory(dir=beside) as place:
            folder = Path(place) / name
            artifact.write(folder, spec, tensors, {}, dtype=side.source.dtype)
            model = load(side.backend, folder, dtype=side.dtype)
            results[name] = text_result(model, side, text, progress, f"student: {name}")
            del model
    for name in ("without_window", "window_alone"):
        results[name]["ratio"] = results[name]["perplexity"] / results["whole"]["perplexity"]
    return results


def _memory(student: Side) -> Result:
    found = sizes.measure(student.source.spec, student.source.tensors)
    return {
        "state_bytes": found.state_bytes,
        "growing_bytes_per_token": found.growing_bytes_per_token,
        "kv_bytes_per_token": found.kv_bytes_per_token,
        "transformer_windows": list(found.transformer_windows),
        "break_even_tokens": found.break_even_tokens,
        "contexts": [
            {
                "context": context,
                "student_bytes": found.memory_bytes(context),
                "transformer_bytes": found.transformer_memory_bytes(context),
            }
            for context in MEMORY_CONTEXTS
        ],
    }
