"""The gradients of a stage's step: rows in turns, summed exactly if asked, captured on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from supra_torch.distributed.exact import Float64Sums
from supra_torch.distributed.sharding import synchronise
from supra_torch.model.model import SupraModel
from supra_torch.recipes.config import Stage
from supra_torch.uptrain.session import Session
from supra_torch.uptrain.step.batches import Batch
from supra_torch.uptrain.step.capture import CapturedGradients, Gradients
from supra_torch.uptrain.step.compilation import compiled_layers, compiles, eagerly
from supra_torch.uptrain.step.stages import gradients
from supra_torch.uptrain.step.step import trained_parameters


@dataclass(frozen=True)
class StageModels:
    """A stage, the student that it trains, and the teacher that it may need."""

    stage: Stage
    student: SupraModel
    teacher: SupraModel | None


def compiled(session: Session, models: StageModels) -> AbstractContextManager[object]:
    """Inside, the stage's steps are compiled if the run compiles."""
    if not compiles(session.config.compile, session.device):
        return eagerly(session.device)
    stage = models.stage
    segments = session.config.in_segments(stage)
    return compiled_layers(stage.kind, models.student, models.teacher, segments=segments)


def stage_gradients(
    session: Session, models: StageModels, optimiser: torch.optim.Optimizer
) -> Gradients:
    """Returns what computes the gradients of this process's part of a batch.

    On a single GPU it is captured as a CUDA graph if the run compiles, unless experts choose rows.
    """
    config, every, device = session.config, session.processes, session.device
    alone, exactly = every.mesh is None, config.sums_exactly
    captured = compiles(config.compile, device) and device.type == "cuda" and alone and not exactly
    captured = captured and models.student.spec.experts is None
    trained = list(trained_parameters(optimiser))
    sums = Float64Sums(trained) if exactly and alone else None
    # FSDP averages over processes, of which some may share rows; exact gradients are sums, so
    # that each row counts the same wherever it is.
    divisor = every.size if exactly else 1

    def compute(batches: Sequence[Batch]) -> Tensor:
        rows = sum(len(batch.ids) for batch in batches) * divisor
        total = torch.zeros((), dtype=torch.float64, device=device)
        for number, batch in enumerate(batches, start=1):
            if number > 1 and not captured:
                session.stop_if_asked()
            synchronise(models.student, number == len(batches))
            share = every.context_parallel_size * len(batch.ids) / rows
            with session.autocast():
                total += gradients(
                    models.stage.kind, models.student, models.teacher, batch, share,
                    config.segment_tokens,
                )  # fmt: skip
            if sums is not None:
                sums.add()
        if sums is not None:
            sums.put_back()
        return total * divisor

    return CapturedGradients(compute, trained, session.say) if captured else compute
