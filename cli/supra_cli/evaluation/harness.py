"""Tasks of the lm-eval harness, by name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from supra_cli.evaluation.sides import Side
from supra_core.errors import MissingDependencyError, SupraError
from supra_core.measure.tasks import TASKS, Record
from supra_core.progress import Progress


def harness_tasks(names: Sequence[str], data: Sequence[Path]) -> list[str]:
    """The names, if they are the harness's and not ours; SupraError where they are mixed."""
    foreign = [name for name in names if name not in TASKS]
    if not foreign:
        return []
    ours = ", ".join(TASKS)
    if len(foreign) < len(names):
        raise SupraError(
            f"--tasks {','.join(names)} mixes tasks of supra ({ours}) with tasks of the lm-eval "
            f"harness ({', '.join(foreign)}): correct the name, or ask for them in two runs"
        )
    if data:
        raise SupraError(
            f"--tasks {','.join(names)} is none of {ours}, and the lm-eval harness has its own "
            "data: correct it, or omit --data"
        )
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingDependencyError(
            f"task {foreign[0]} is none of {ours}: correct it, or install the lm-eval harness for "
            "its tasks with pip install 'supra-lm[eval]'"
        )
    return foreign


def harness_results(
    side: Side, tasks: Sequence[str], limit: int | None, progress: Progress
) -> dict[str, Record]:
    """The harness's results by task."""
    from supra_torch.inference.lm_eval import evaluate

    model = side.load()
    # Some of the harness's data sets print, which must not end up in a record on stdout.
    with redirect_stdout(sys.stderr):
        found = evaluate(
            model, side.tokenizer, tasks, form=side.form, limit=limit, progress=progress,
            stage=side.stage(", ".join(tasks)),
        )  # fmt: skip
    return {name: {**side.computed, **result} for name, result in found.items()}
