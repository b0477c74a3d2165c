"""The loop: stage after stage, step after step, with checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from supra_core import artifact
from supra_core.errors import EndedByAnother, Preempted, SupraError, WriteError
from supra_core.formats.atomic import flush_to_disk
from supra_core.spec import ModelSpec
from supra_torch.model import SupraModel
from supra_torch.uptrain import checkpoint
from supra_torch.uptrain.capture import Gradients
from supra_torch.uptrain.checkpoint import Checkpoints, Place
from supra_torch.uptrain.compilation import eagerly
from supra_torch.uptrain.config import UptrainConfig
from supra_torch.uptrain.folder import logged_losses, metrics_of
from supra_torch.uptrain.guard import LossGuard
from supra_torch.uptrain.interrupts import stop_if_asked
from supra_torch.uptrain.session import Session
from supra_torch.uptrain.sharding import release, trained_student
from supra_torch.uptrain.stages import next_token_loss, optimiser_for
from supra_torch.uptrain.step import training_step


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
    try:
        while place.stage < len(steps):
            place = _run_stage(session, saver, place, steps[place.stage])
        saver.wait()
    finally:
        saver.close()
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
    compute = session.gradients(stage, student, optimiser)
    guard = LossGuard(config.divergence, logged_losses(session.run, place))

    def save(optimiser: torch.optim.Optimizer | None) -> None:
        if session.processes.is_first:
            # A checkpoint is not to outlast the lines of its steps.
            flush_to_disk(metrics_of(session.run))
        saver.save(place, _trained(session.spec, place), student, optimiser, names)

    with session.stop.held(_noticed(session)):
        try:
            with session.compiled(stage, student):
                if within and place.perplexity is None and _evaluation_is_due(config, place, steps):
                    place = _evaluate(session, place, student)
                while place.stage_step < steps:
                    record = _step(session, place, compute, optimiser, steps)
                    place = replace(
                        place,
                        stage_step=place.stage_step + 1,
                        step=place.step + 1,
                        tokens=place.tokens + record["step_tokens"],
                        perplexity=None,
                    )
                    _conclude(session, saver, guard, place, record, steps)
                    if place.stage_step == steps:
                        break
                    if _evaluation_is_due(config, place, steps):
                        place = _evaluate(session, place, student)
                    if place.step % config.checkpoint_every == 0 and guard.healthy:
                        save(optimiser)
                place = _evaluate(session, place, student)
        except (KeyboardInterrupt, Preempted):
            if place.step != saver.saved.step and place.stage_step and not session.stop.is_forced:
                save(optimiser)
            saver.wait()
            raise
        place = replace(place, stage=place.stage + 1, stage_step=0)
        save(None)
    return place


def _conclude(
    session: Session,
    saver: Checkpoints,
    guard: LossGuard,
    place: Place,
    record: Mapping[str, Any],
    steps: int,
) -> None:
    """After a step: log it, and raise, in all processes at once, what ends the run here."""
    unlogged = None
    try:
        session.log({**record, "tokens": place.tokens})
    except WriteError as error:
        unlogged = error
    failed, *asked = session.processes.sums(
        [float(saver.failed or unlogged is not None), *session.stop.flags()]
    )
    if failed:
        saver.wait()
        raise unlogged or EndedByAnother(f"{session.run}: another process could not save")
    guard.add(record["loss"])
    if guard.diverged:
        raise _diverged(session, place, guard)
    session.progress(
        record["stage"], place.stage_step, steps,
        loss=record["loss"], tokens_per_second=record["tokens_per_second"],
    )  # fmt: skip
    stop_if_asked(asked)


def _noticed(session: Session) -> Callable[[], None]:
    return lambda: session.say("stopping, with a checkpoint of the last whole step")


def _evaluation_is_due(config: UptrainConfig, place: Place, steps: int) -> bool:
    """Whether the held-out perplexity is measured here, inside a stage of so many steps."""
    every = config.evaluate_every
    return bool(every) and place.step % every == 0 and 0 < place.stage_step < steps


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
    optimiser: torch.optim.Optimizer,
    steps: int,
) -> dict[str, Any]:
    """One optimiser step; returns its line of metrics."""
    stage, began = session.config.stages[place.stage], time.perf_counter()
    every = session.processes
    rows, _ = session.config.batch_shape(stage)
    batch = session.data.batch(place.tokens, rows, stage.cut, every.share(rows))
    ids = torch.from_numpy(batch).to(session.device)
    factor = learning_rate_factor(place.stage_step, steps, stage.warmup, stage.final_learning_rate)
    try:
        loss, norm = training_step(
            lambda: compute(ids),
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
    seconds, tokens = time.perf_counter() - began, ids.numel() * every.size
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
    """exp of the mean loss over the held-out sequences, which are all of one length.

    Processes share them; each takes as many, since a sharded model needs all of them to compute.
    """
    rows, every = session.data.held_out(), session.processes
    total = 0.0
    for first in range(0, len(rows), every.size):
        session.stop_if_asked()
        number = first + every.rank
        ids = torch.from_numpy(rows[min(number, len(rows) - 1)])[None].to(session.device)
        with session.autocast(), eagerly(session.device):
            loss = next_token_loss(model, ids).item()
        total += loss if number < len(rows) else 0.0
    release(model)
    (total,) = every.sums([total])
    # Far from a language model the mean loss can exceed what exp can hold.
    return math.exp(min(total / len(rows), 700.0))


def _trained(spec: ModelSpec, place: Place) -> ModelSpec:
    before = spec.provenance
    tokens = before.trained_tokens + place.tokens
    return replace(spec, provenance=replace(before, trained_tokens=tokens))
