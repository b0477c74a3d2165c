"""One step of a stage: read the text, train on it, say how it went."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch

from supra_torch.run_folder.checkpoint import Place
from supra_torch.uptrain.memory import peak_memory
from supra_torch.uptrain.session import Session
from supra_torch.uptrain.step.batches import Batches
from supra_torch.uptrain.step.capture import Gradients
from supra_torch.uptrain.step.step import StepResult, training_step


@dataclass(frozen=True)
class Work:
    """What the steps of a stage are made with; ``steps`` in the whole stage.

    ``busy_seconds``: what a token takes of all devices at their peak; None if that is unknown.
    """

    compute: Gradients
    batches: Batches
    optimiser: torch.optim.Optimizer
    steps: int
    busy_seconds: float | None = None


def one_step(session: Session, place: Place, work: Work, most: float) -> dict[str, Any]:
    """One optimiser step, left out above a gradient norm of ``most``; its line of metrics."""
    stage, began = session.config.stages[place.stage], time.perf_counter()
    every = session.processes
    rows, _ = session.config.batch_shape(stage)
    read = place.tokens + place.passed_over
    own = session.data.batch(read, rows, stage.cut, every.share(rows))
    parts = work.batches.of(own)
    loaded = time.perf_counter()
    factor = learning_rate_factor(
        place.stage_step, work.steps, stage.warmup, stage.final_learning_rate
    )
    result = training_step(
        lambda: work.compute(parts),
        work.optimiser,
        learning_rate_factor=factor,
        clip=stage.clip,
        mean=lambda loss: every.sums([loss])[0] / every.size,
        most=most,
        clip_gradients=session.clip_gradients,
    )
    seconds, tokens = time.perf_counter() - began, own.ids.size * every.crews
    record: dict[str, Any] = {
        "stage": stage.kind,
        "stage_index": place.stage,
        "step": place.step + 1,
        "loss": _number(result.loss),
        "gradient_norm": _number(result.norm),
        "learning_rate": stage.learning_rate * factor,
        "step_tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "data_seconds": loaded - began,
        "memory_bytes": peak_memory(session.device),
    }
    if work.busy_seconds is not None:
        record["mfu"] = work.busy_seconds * tokens / seconds
    if not result.taken:
        record["left_out"] = _complaint(result, most)
    return record


def _number(value: float) -> float | None:
    """None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def _complaint(result: StepResult, most: float) -> str:
    """Why a step is left out."""
    if not math.isfinite(result.loss) or not math.isfinite(result.norm):
        return f"loss {result.loss:.4g} and gradient norm {result.norm:.4g} are not both finite"
    return f"its gradient norm {result.norm:.4g} is above {most:.4g}"


def learning_rate_factor(step: int, steps: int, warmup: float, final: float) -> float:
    """Linear warmup over a share of the steps, then a cosine to ``final``; 0 <= step < steps."""
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - warm)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
