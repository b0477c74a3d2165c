"""Training steps of a linear model beside those of the transformer it comes from, in turns.

Every model trains in a process of its own, so that each peak of memory is its own; the processes
take one step each in turns (A B A B ...), so that whatever else the machine does falls on all
alike. The step is the very one of an uptraining run: forward, backward, clip, fused AdamW.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from supra_core.errors import SupraError
from supra_core.measure.tables import Table, origin
from supra_core.sources.source import Source, open_source
from supra_torch.benchmark.timing import environment
from supra_torch.benchmark.trainer import Summary, Training, serve
from supra_torch.devices import recognised
from supra_torch.precision import resolved_precision
from supra_torch.recipes.config import (
    DEFAULT_RECIPE,
    UptrainConfig,
    recipe_named,
    validate,
)
from supra_torch.uptrain.step.compilation import compiles

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
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Median seconds of a training step for every kind, recipe and length, and of the original's.

    ``recipes`` linearize a transformer (None: the default one); a model that is linear already
    takes none. ``kinds`` are those of a recipe's stages. Tokens are random, the same for all.
    Returns ``rows`` and what they were measured with; ``notes`` say what was not measured, and
    why; ``keep`` is given the same after every length. A row whose process died has a ``reason``
    instead of figures. Raises SupraError when the input is bad or every process died.
    """
    if steps < 1:
        raise SupraError(f"--steps {steps}: at least one step must be measured")
    source = open_source(model)
    notes = _notes(model, source, lengths, batch_tokens)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = environment(device)
    kind = resolved_precision(precision, device)
    known = recognised(where["device"])
    peak = None if known is None else known.products(kind)
    result: dict[str, Any] = {
        "benchmark": "train",
        "model": model,
        "batch_tokens": batch_tokens,
        "steps": steps,
        "precision": kind,
        "activation_checkpointing": activation_checkpointing,
        "segment_tokens": segment_tokens,
        "compile": compiles(compile, device),
        "peak_flops": peak,
        **where,
        "rows": [],
        "notes": notes,
    }
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
        rows = _measure(plan, steps, log)
        result["rows"] += [{**row, "mfu": _utilisation(row, peak)} for row in rows]
        notes += [note for row in rows for note in _shortcomings(row)]
        if any(row["reason"] is None for row in result["rows"]):
            keep(result)
    if all(row["reason"] for row in result["rows"]):
        raise SupraError(result["rows"][0]["reason"])
    return result


def _utilisation(row: dict[str, Any], peak: float | None) -> float | None:
    speed = row["tokens_per_second"]
    return None if peak is None or speed is None else row["flops_per_token"] * speed / peak


def _shortcomings(row: dict[str, Any]) -> Iterator[str]:
    if row["reason"]:
        yield row["reason"]
    if row["captured"] is False:
        yield (
            f"'{row['name']}' at length {row['length']} could not be captured as a CUDA graph: "
            "the host launched every kernel"
        )


def table(result: dict[str, Any]) -> Table:
    """The result for people."""
    rows = [
        (
            row["name"],
            str(row["length"]),
            _shown(row["tokens_per_second"], ",.0f"),
            _shown(row["seconds_median"], ".2f"),
            _shown(row["seconds_least"], ".2f"),
            _shown(row["seconds_most"], ".2f"),
            _shown(row["peak_memory_bytes"], ",.2f", scale=1e-9),
            _shown(row["mfu"], ".1f", scale=100, unit=" %"),
            _shown(row["speed_ratio"], ".2f", unit=" x"),
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


def _shown(value: float | None, form: str, *, scale: float = 1.0, unit: str = "") -> str:
    return "-" if value is None else f"{value * scale:{form}}{unit}"


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
    """A process that trains when told to. ``reason``: why it has died, if it has."""

    def __init__(self, row: _Row, log: Callable[[str], None]) -> None:
        self.row, self.length = row, row.training.config.sequence_length
        self.seconds: list[float] = []
        self.reason: str | None = None
        self._log = log
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(row.training, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def ask(self, *message: Any) -> Any:
        """Send a message, if there is one, and wait for the answer; None from a dead process.

        Raises SupraError when the answer is that the input is bad.
        """
        if self.reason is not None:
            return None
        try:
            for part in message:
                self._pipe.send(part)
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            self.reason = (
                f"'{self.row.name}' at length {self.length} ended with code "
                f"{self._process.exitcode} (-9: out of memory): use fewer --batch-tokens or one "
                "--recipe at a time, or see its error above"
            )
            self._log(self.reason)
            return None
        if isinstance(answer, str) and answer != "ready":
            raise SupraError(answer)
        return answer

    def step(self, number: int) -> str:
        """Take one step; what it took, for people."""
        seconds = self.ask(number)
        if seconds is None:
            return "-"
        self.seconds.append(seconds)
        return f"{seconds:.2f}"

    def close(self) -> None:
        self._pipe.close()
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.terminate()


def _measure(plan: Sequence[_Row], steps: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    with ExitStack() as stack:
        trainers = []
        for row in plan:
            trainers.append(_Trainer(row, log))
            stack.callback(trainers[-1].close)
            # One after the other: loading needs more memory than it leaves behind.
            trainers[-1].ask()
        for number in range(_WARMUP + steps):
            spent = ", ".join(trainer.step(number) for trainer in trainers)
            log(f"  step {number + 1} of {_WARMUP + steps}: {spent} s")
        results = [_result(trainer, trainer.ask(None)) for trainer in trainers]
    base = results[0]["tokens_per_second"] if plan[0].training.original else None
    for result in results:
        speed = result["tokens_per_second"]
        result["speed_ratio"] = None if base is None or speed is None else speed / base
    return results


def _result(trainer: _Trainer, summary: Summary | None) -> dict[str, Any]:
    """What a trainer measured; nothing but the reason where it has died."""
    config = trainer.row.training.config
    tokens = math.prod(config.batch_shape(config.stages[0]))
    seconds = [] if summary is None else trainer.seconds[_WARMUP:]
    median = statistics.median(seconds) if seconds else None
    return {
        "name": trainer.row.name,
        "original": trainer.row.training.original,
        "kind": config.stages[0].kind,
        "length": trainer.length,
        "step_tokens": tokens,
        "seconds_median": median,
        "seconds_least": min(seconds, default=None),
        "seconds_most": max(seconds, default=None),
        "tokens_per_second": None if median is None else tokens / median,
        "peak_memory_bytes": None if summary is None else summary.peak_bytes,
        "flops_per_token": None if summary is None else summary.flops_per_token,
        "captured": None if summary is None else summary.captured,
        "reason": trainer.reason,
    }
