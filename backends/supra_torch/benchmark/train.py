"""Training steps of a linear model beside those of the transformer it comes from, in turns.

Every model trains in a process of its own, so that each peak of memory is its own; the processes
take one step each in turns (A B A B ...), so that whatever else the machine does falls on all
alike. The step is the very one of an uptraining run: forward, backward, clip, fused AdamW.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from supra_core.errors import SupraError
from supra_core.sources import Source, open_source
from supra_core.tables import Table, origin
from supra_torch.benchmark.timing import environment
from supra_torch.benchmark.trainer import Training, serve
from supra_torch.devices import recognised
from supra_torch.uptrain.compilation import compiles
from supra_torch.uptrain.config import (
    DEFAULT_RECIPE,
    UptrainConfig,
    recipe_named,
    validate,
)
from supra_torch.uptrain.step import resolved_precision

ORIGINAL = "original (transformers, SDPA)"
_LOADABLE_BY_TRANSFORMERS = ("gguf", "hf")
# The first steps compile, allocate memory and the optimiser's state, and touch new pages.
_WARMUP = 3


@dataclass(frozen=True)
class _Row:
    name: str
    training: Training


def benchmark(
    model: str,
    *,
    recipes: Sequence[str] | None,
    kinds: Sequence[str],
    lengths: Sequence[int],
    batch_tokens: int,
    steps: int,
    precision: str = "auto",
    activation_checkpointing: bool = False,
    segment_tokens: int = 0,
    compile: str = "auto",
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Median seconds of a training step for every kind, recipe and length, and of the original's.

    ``recipes`` linearize a transformer (None: the default one); a model that is linear already
    takes none. ``kinds`` are those of a recipe's stages. Tokens are random, the same for all.
    Returns ``rows`` and what they were measured with; ``notes`` say what was not measured, and
    why. Raises SupraError when the input is bad or a process dies.
    """
    if steps < 1:
        raise SupraError(f"--steps {steps}: at least one step must be measured")
    source = open_source(model)
    notes = _notes(model, source, lengths, batch_tokens)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for length in lengths:
        plan = _plan(
            model, source, recipes, kinds,
            settings={
                "sequence_length": length, "batch_tokens": batch_tokens, "precision": precision,
                "activation_checkpointing": activation_checkpointing, "compile": compile,
                "segment_tokens": segment_tokens,
            },
            device=device,
        )  # fmt: skip
        log(f"length {length}: {', '.join(row.name for row in plan)}")
        rows.extend(_measure(plan, steps, log))
    where = environment(device)
    precision = resolved_precision(precision, device)
    known = recognised(where["device"])
    peak = None if known is None else known.products(precision)
    for row in rows:
        flops, speed = row["flops_per_token"], row["tokens_per_second"]
        row["mfu"] = None if peak is None else flops * speed / peak
    return {
        "benchmark": "train",
        "model": model,
        "batch_tokens": batch_tokens,
        "steps": steps,
        "precision": precision,
        "activation_checkpointing": activation_checkpointing,
        "segment_tokens": segment_tokens,
        "compile": compiles(compile, device),
        "peak_flops": peak,
        **where,
        "rows": rows,
        "notes": notes,
    }


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    rows = [
        (
            row["name"],
            str(row["length"]),
            f"{row['tokens_per_second']:,.0f}",
            f"{row['seconds_median']:.2f}",
            f"{row['seconds_least']:.2f}",
            f"{row['seconds_most']:.2f}",
            f"{row['peak_memory_bytes'] / 1e9:,.2f}",
            "-" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %",
            "-" if row["speed_ratio"] is None else f"{row['speed_ratio']:.2f} x",
        )
        for row in result["rows"]
    ]
    return Table(
        title=f"Training {Path(result['model']).name}, {result['precision']}: {origin(result)}",
        columns=(
            "training step", "length", "tokens/s", "a step, s", "least", "most", "peak, GB",
            "MFU", "against the original",
        ),
        rows=rows,
        notes=(
            *result["notes"],
            f"a step has {result['batch_tokens']:,} random tokens: forward, backward, clip, AdamW; "
            f"times are medians of {result['steps']} steps, taken in turns",
            *_about(result),
        ),
    )  # fmt: skip


def _about(result: dict[str, Any]) -> list[str]:
    notes = []
    if result["segment_tokens"]:
        notes.append(f"ours compute {result['segment_tokens']:,} tokens of a row at a time")
    if result["compile"]:
        notes.append("ours are compiled layer by layer, the original is not, as in transformers")
    if result["peak_flops"] is not None:
        notes.append(
            "MFU: 6 operations a token and weight that is multiplied, and 2 for the teacher's "
            f"forward, of {result['peak_flops'] / 1e12:,.0f} TFLOP/s; attention is left out"
        )
    return notes


def _notes(model: str, source: Source, lengths: Sequence[int], batch_tokens: int) -> list[str]:
    notes = []
    if not source.spec.is_transformer:
        notes.append(f"the original was not measured: {model} is linear already")
    elif source.kind not in _LOADABLE_BY_TRANSFORMERS:
        notes.append(f"the original was not measured: transformers does not load {source.kind}")
    for length in lengths:
        tokens = max(1, batch_tokens // length) * length
        if tokens != batch_tokens:
            notes.append(f"length {length}: a step has {tokens} tokens, in whole sequences")
    return notes


def _plan(
    model: str,
    source: Source,
    recipes: Sequence[str] | None,
    kinds: Sequence[str],
    *,
    settings: dict[str, Any],
    device: torch.device,
) -> list[_Row]:
    """What is measured at one length, the original first."""

    def training(kind: str, recipe: str, *, original: bool = False) -> Training:
        config = _config(model, kind, recipe, settings)
        precision = resolved_precision(config.precision, device)
        return Training(config, original, precision, torch.get_num_threads())

    if source.spec.is_transformer:
        names = list(recipes or [DEFAULT_RECIPE])
        rows = [_Row(f"{name}: {kind}", training(kind, name)) for name in names for kind in kinds]
        if source.kind in _LOADABLE_BY_TRANSFORMERS:
            rows.insert(0, _Row(ORIGINAL, training("uptrain", names[0], original=True)))
        return rows
    if recipes:
        raise SupraError(f"{model} is linear already, as its conversion chose: drop --recipe")
    return [_Row(kind, training(kind, DEFAULT_RECIPE)) for kind in kinds]


def _config(model: str, kind: str, recipe: str, settings: dict[str, Any]) -> UptrainConfig:
    """A run of one stage: the recipe's of that kind, or one with the published learning rate."""
    values = recipe_named(recipe)
    default = {"kind": kind, "share": 1.0, "learning_rate": 3e-5, "new_learning_rate": 3e-5}
    stage = next((stage for stage in values["stages"] if stage["kind"] == kind), default)
    # Every row of the table is timed at the stated shape.
    stage = {**stage, "cut": 1, "batch_share": 1.0}
    # The tokens are random: no data is read.
    checkpointing = settings["activation_checkpointing"] or values.get("activation_checkpointing")
    values |= {**settings, "activation_checkpointing": bool(checkpointing)}
    return validate(
        {**values, "model": model, "data": "random", "stages": [stage]},
        "the benchmark",
    )


# --- measuring ----------------------------------------------------------------------------------


class _Trainer:
    """A process that trains when told to."""

    def __init__(self, row: _Row) -> None:
        self.name, self.length = row.name, row.training.config.sequence_length
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(row.training, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, *message: Any) -> Any:
        """Send a message, if there is one, and wait for the answer."""
        try:
            for part in message:
                self._pipe.send(part)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            raise SupraError(
                f"'{self.name}' at length {self.length} ended with code {self._process.exitcode} "
                "(-9: out of memory): use fewer --batch-tokens, or see its error above"
            ) from None
        if isinstance(answer, str) and answer != "ready":
            raise SupraError(answer)
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.terminate()


def _measure(plan: Sequence[_Row], steps: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    seconds: list[list[float]] = [[] for _ in plan]
    with ExitStack() as stack:
        trainers = []
        for row in plan:
            trainers.append(_Trainer(row))
            stack.callback(trainers[-1].close)
            # One after the other: loading needs more memory than it leaves behind.
            trainers[-1].ask()
        for number in range(_WARMUP + steps):
            for trainer, measured in zip(trainers, seconds, strict=True):
                measured.append(trainer.ask(number))
            spent = ", ".join(f"{measured[-1]:.2f}" for measured in seconds)
            log(f"  step {number + 1} of {_WARMUP + steps}: {spent} s")
        ends = [trainer.ask(None) for trainer in trainers]
    rows = [
        _result(row, measured[_WARMUP:], *end)
        for row, measured, end in zip(plan, seconds, ends, strict=True)
    ]
    base = rows[0]["tokens_per_second"] if plan[0].training.original else None
    return [
        {**row, "speed_ratio": None if base is None else row["tokens_per_second"] / base}
        for row in rows
    ]


def _result(row: _Row, seconds: Sequence[float], peak: int, flops: int) -> dict[str, Any]:
    config = row.training.config
    tokens, median = math.prod(config.batch_shape(config.stages[0])), statistics.median(seconds)
    return {
        "name": row.name,
        "original": row.training.original,
        "kind": config.stages[0].kind,
        "length": config.sequence_length,
        "step_tokens": tokens,
        "seconds_median": median,
        "seconds_least": min(seconds),
        "seconds_most": max(seconds),
        "tokens_per_second": tokens / median,
        "peak_memory_bytes": peak,
        "flops_per_token": flops,
    }
