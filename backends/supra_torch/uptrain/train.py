"""The loop: stage after stage, step after step, with checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from supra_core import artifact
from supra_core.errors import Preempted, SupraError
from supra_core.progress import Progress
from supra_core.spec import ModelSpec
from supra_core.tensors import LazyTensor
from supra_torch.model import SupraModel
from supra_torch.uptrain import checkpoint
from supra_torch.uptrain.batches import Batch, Batches
from supra_torch.uptrain.capture import CapturedGradients, Gradients
from supra_torch.uptrain.checkpoint import Checkpoints, Place
from supra_torch.uptrain.compilation import compiled_layers, compiles, eagerly
from supra_torch.uptrain.config import Stage, UptrainConfig
from supra_torch.uptrain.data import Mixture
from supra_torch.uptrain.folder import log, logged_losses
from supra_torch.uptrain.guard import LossGuard
from supra_torch.uptrain.interrupts import Stop, stop_if_asked
from supra_torch.uptrain.processes import Processes
from supra_torch.uptrain.sharding import release, synchronise, trained_student
from supra_torch.uptrain.stages import gradients, next_token_loss, optimiser_for
from supra_torch.uptrain.step import autocast, trained_parameters, training_step


@dataclass(frozen=True)
class Session:
    """Everything that does not change while a run goes on.

    ``spec`` and ``begins``: the student as it begins, before any step.
    """

    config: UptrainConfig
    run: Path
    processes: Processes
    precision: str
    data: Mixture
    teacher: SupraModel | None
    spec: ModelSpec
    begins: Mapping[str, LazyTensor]
    assets: Mapping[str, bytes]
    progress: Progress
    say: Callable[[str], None]

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.precision)

    @property
    def compiles(self) -> bool:
        """Whether steps are compiled, and on a single GPU captured."""
        return compiles(self.config.compile, self.device)

    def compiled(self, stage: Stage, student: SupraModel) -> AbstractContextManager[object]:
        """Inside, the stage's steps are compiled if the run compiles."""
        if not self.compiles:
            return eagerly(self.device)
        return compiled_layers(stage.kind, student, self.teacher)

    def gradients(
        self, stage: Stage, student: SupraModel, optimiser: torch.optim.Optimizer
    ) -> Gradients:
        """What a step of the stage computes of this process's part of a batch."""

        def compute(batches: Sequence[Batch]) -> Tensor:
            rows = sum(len(batch.ids) for batch in batches)
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for number, batch in enumerate(batches, start=1):
                synchronise(student, number == len(batches))
                with self.autocast():
                    share = len(batch.ids) / rows
                    total += gradients(stage.kind, student, self.teacher, batch, share)
            return total

        alone = self.processes.mesh is None
        if not self.compiles or self.device.type != "cuda" or not alone:
            return compute
        return CapturedGradients(compute, list(trained_parameters(optimiser)), self.say)

    def batches(self, cut: int) -> Batches:
        """Puts rows on the device, for a stage that cuts sequences so."""
        return Batches(self.data, cut, self.config.device_rows, self.device)

    def log(self, record: Mapping[str, Any]) -> None:
        """One line in metrics.jsonl, by the first process."""
        if self.processes.is_first:
            log(self.run, record)


def train(session: Session, place: Place) -> dict[str, Any]:
    """From ``place`` to the end; returns the run's summary."""
    config = session.config
    held_out = None if session.teacher is None else _perplexity(session, session.teacher)
    if not config.needs_teacher:
        session = replace(session, teacher=None)
    if place.step == 0:
        session.log({"evaluation": "held_out", "teacher_perplexity": held_out, "step": 0})
    saver = Checkpoints(
        session.run, session.processes, session.assets, config.keep_checkpoints, place
    )
    steps = config.stage_steps()
    while place.stage < len(steps):
        place = _run_stage(session, saver, place, steps[place.stage])
    saver.wait()
    session.processes.wait()
    return {
        "run": str(session.run),
        "model": str(session.run / "model"),
        "tokens": place.tokens,
        "steps": place.step,
        "precision": session.precision,
        "held_out_perplexity": place.perplexity,
        "teacher_held_out_perplexity": held_out,
    }


def _run_stage(session: Session, saver: Checkpoints, place: Place, steps: int) -> Place:
    """Train from ``place`` to the end of its stage: the beginning of the next one."""
    config, stage = session.config, session.config.stages[place.stage]
    saver.wait()
    session.processes.wait()
    newest = checkpoint.newest(session.run)
    tensors = artifact.read(newest / "model").tensors if newest else session.begins
    # Adapters and the optimiser are a stage's own: only one that goes on has any to read.
    within = newest if place.stage_step else None
    student = trained_student(
        config, stage, session.spec, tensors, session.processes,
        checkpoint.read_adapters(within) if within and stage.lora_rank else None,
    )  # fmt: skip
    if place.step == 0:
        place = _evaluate(session, place, student)
    optimiser = optimiser_for(student, stage)
    names = {parameter: name for name, parameter in student.named_parameters()}
    if within:
        checkpoint.load_optimiser(within, optimiser, names, place.stage_step)
    compute, batches = session.gradients(stage, student, optimiser), session.batches(stage.cut)
    guard = LossGuard(config.divergence, logged_losses(session.run, place))

    def save(optimiser: torch.optim.Optimizer | None) -> None:
        saver.save(place, _trained(session.spec, place), student, optimiser, names)

    try:
        with Stop(_noticed(session)) as stop, session.compiled(stage, student):
            while place.stage_step < steps:
                record = _step(session, place, compute, batches, optimiser, steps)
                failed, *asked = session.processes.sums([float(saver.failed), *stop.flags()])
                place = replace(
                    place,
                    stage_step=place.stage_step + 1,
                    step=place.step + 1,
                    tokens=place.tokens + record["step_tokens"],
                    perplexity=None,
                )
                session.log({**record, "tokens": place.tokens})
                guard.add(record["loss"])
                if failed:
                    saver.wait()
                    raise SupraError(f"{session.run}: another process could not save")
                if guard.diverged:
                    raise _diverged(session, place, guard)
                session.progress(
                    stage.kind, place.stage_step, steps,
                    loss=record["loss"], tokens_per_second=record["tokens_per_second"],
                )  # fmt: skip
                stop_if_asked(asked)
                if place.stage_step == steps:
                    break
                if config.evaluate_every and place.step % config.evaluate_every == 0:
                    place = _evaluate(session, place, student)
                if place.step % config.checkpoint_every == 0 and guard.healthy:
                    save(optimiser)
            place = _evaluate(session, place, student)
    except (KeyboardInterrupt, Preempted):
        if place.step != saver.saved.step and place.stage_step:
            save(optimiser)
        saver.wait()
        raise
    place = replace(place, stage=place.stage + 1, stage_step=0)
    save(None)
    return place


def _noticed(session: Session) -> Callable[[], None]:
    return lambda: session.say("stopping after this step, with a checkpoint of it")


def _diverged(session: Session, place: Place, guard: LossGuard) -> SupraError:
    return SupraError(
        f"{session.run}: the loss diverges at step {place.step} (mean of the last steps "
        f"{guard.mean:.4g}, before {guard.lowest:.4g}): lower stages.{place.stage}.learning_rate "
        "in a new run; the last good checkpoint is kept"
    )


def _step(
    session: Session,
    place: Place,
    compute: Gradients,
    batches: Batches,
    optimiser: torch.optim.Optimizer,
    steps: int,
) -> dict[str, Any]:
    """One optimiser step; returns its line of metrics."""
    stage, began = session.config.stages[place.stage], time.perf_counter()
    every = session.processes
    rows, _ = session.config.batch_shape(stage)
    own = session.data.batch(place.tokens, rows, stage.cut, every.share(rows))
    parts = batches.of(own)
    factor = learning_rate_factor(place.stage_step, steps, stage.warmup, stage.final_learning_rate)
    try:
        loss, norm = training_step(
            lambda: compute(parts),
            optimiser,
            learning_rate_factor=factor,
            clip=stage.clip,
            mean=lambda loss: every.sums([loss])[0] / every.size,
        )
    except FloatingPointError as error:
        raise SupraError(
            f"{session.run}: the loss is no longer finite at step {place.step + 1} ({error}): "
            f"lower stages.{place.stage}.learning_rate; the last checkpoint is kept"
        ) from None
    seconds, tokens = time.perf_counter() - began, own.ids.size * every.size
    return {
        "stage": stage.kind,
        "stage_index": place.stage,
        "step": place.step + 1,
        "loss": loss,
        "gradient_norm": norm,
        "learning_rate": stage.learning_rate * factor,
        "step_tokens": tokens,
        "tokens_per_second": tokens / seconds,
    }


def learning_rate_factor(step: int, steps: int, warmup: float, final: float) -> float:
    """Linear warmup over a share of the steps, then a cosine to ``final``; 0 <= step < steps."""
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - warm)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def _evaluate(session: Session, place: Place, student: SupraModel) -> Place:
    """``place`` with its held-out perplexity, which is written to the metrics."""
    place = replace(place, perplexity=_perplexity(session, student))
    record = {"evaluation": "held_out", "step": place.step, "perplexity": place.perplexity}
    session.log({**record, "tokens": place.tokens})
    session.progress("evaluate", 1, 1, perplexity=place.perplexity or math.nan)
    return place


@torch.no_grad()
def _perplexity(session: Session, model: SupraModel) -> float:
    """exp of the mean loss over what can be predicted of the held-out sequences.

    Processes share them; each takes as many, since a sharded model needs all of them to compute.
    """
    rows, every = session.data.held_out(), session.processes
    batches, total, targets = session.batches(1), 0.0, 0.0
    for first in range(0, len(rows), every.size):
        number = min(first + every.rank, len(rows) - 1)
        row = rows[number : number + 1]
        (batch,) = batches.of(row)
        with session.autocast(), eagerly(session.device):
            loss = next_token_loss(model, batch).item() * (batch.ids.numel() - 1)
        if number == first + every.rank:
            total, targets = total + loss, targets + row.targets
    release(model)
    total, targets = every.sums([total, targets])
    # Far from a language model the mean loss can exceed what exp can hold.
    return math.exp(min(total / targets, 700.0))


def _trained(spec: ModelSpec, place: Place) -> ModelSpec:
    before = spec.provenance
    tokens = before.trained_tokens + place.tokens
    return replace(spec, provenance=replace(before, trained_tokens=tokens))
