"""The loop: stage after stage, step after step, with checkpoints."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from supra_core.artifact import folder as artifact
from supra_core.errors import EndedByAnother, FormatError, Preempted, SupraError, WriteError
from supra_core.formats.atomic import flush_to_disk
from supra_core.model.spec import ModelSpec
from supra_core.tensors import TensorSource
from supra_torch.distributed.sharding import frozen_teacher, release, trained_student
from supra_torch.model.model import SupraModel
from supra_torch.recipes.config import UptrainConfig
from supra_torch.run_folder import checkpoint
from supra_torch.run_folder.checkpoint import Checkpoints, Place
from supra_torch.run_folder.folder import (
    logged_steps,
    logged_teacher_perplexity,
    metrics_of,
    trim_log,
)
from supra_torch.uptrain.estimate import Estimate
from supra_torch.uptrain.guard import Guards, LossGuard
from supra_torch.uptrain.interrupts import stop_if_asked
from supra_torch.uptrain.memory import reset_peak
from supra_torch.uptrain.one_step import Work, one_step
from supra_torch.uptrain.profile import profiled
from supra_torch.uptrain.session import Session
from supra_torch.uptrain.step.compilation import eagerly
from supra_torch.uptrain.step.operations import flops_per_token
from supra_torch.uptrain.step.stages import next_token_loss, optimiser_for


def train(
    session: Session, place: Place, teacher: tuple[ModelSpec, TensorSource] | None
) -> dict[str, Any]:
    """From ``place`` to the end; returns the run's summary.

    ``teacher``: what the student is measured against, and learns from in most stages.
    """
    config = session.config
    session, held_out = _with_teacher(session, teacher, place)
    if place.step == 0:
        session.log({"evaluation": "held_out", "teacher_perplexity": held_out, "step": 0})
    saver = Checkpoints(
        session.run, session.processes, session.assets, config.keep_checkpoints, place
    )
    steps = config.stage_steps()
    _refuse_elsewhere(session, place, steps)
    try:
        while place.stage < len(steps):
            try:
                place = _run_stage(session, saver, place, steps[place.stage])
            except Diverged as diverged:
                place = _back(session, saver, diverged)
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


def _refuse_elsewhere(session: Session, place: Place, steps: Sequence[int]) -> None:
    """Raise FormatError when the run cannot stand where its checkpoint says."""
    within = place.stage < len(steps) and place.stage_step <= steps[place.stage]
    before = sum(steps[: place.stage])
    if (within or (place.stage, place.stage_step) == (len(steps), 0)) and (
        place.step == before + place.stage_step
    ):
        return
    newest = checkpoint.folder_of(session.run, place.step)
    with checkpoint.dispensable(newest):
        raise FormatError(
            f"{newest / checkpoint.STATE} states step {place.stage_step} of stage {place.stage}, "
            f"where this run is not after {place.step} steps: get the file again"
        )


def _with_teacher(
    session: Session, teacher: tuple[ModelSpec, TensorSource] | None, place: Place
) -> tuple[Session, float | None]:
    """The session with its teacher, and that one's held-out perplexity.

    Where no stage learns from it, it is gone again: it would take memory to the end of the run.
    """
    if teacher is None:
        return session, None
    held_out = _teacher_perplexity_before(session, place)
    if held_out is not None and not session.config.needs_teacher:
        return session, held_out
    model = frozen_teacher(*teacher, session.precision, session.processes)
    if held_out is None:
        held_out = _perplexity(session, model)
    return (replace(session, teacher=model) if session.config.needs_teacher else session), held_out


def _teacher_perplexity_before(session: Session, place: Place) -> float | None:
    """As the first process finds it in the log of a run that goes on."""
    goes_on = place.step and session.processes.is_first
    found = logged_teacher_perplexity(session.run) if goes_on else None
    (agreed,) = session.processes.sums([found or 0.0])
    return agreed or None


def _run_stage(session: Session, saver: Checkpoints, place: Place, steps: int) -> Place:
    """Train from ``place`` to the end of its stage: the beginning of the next one."""
    config, stage = session.config, session.config.stages[place.stage]
    _wait_together(session, saver)
    # Sharded modules are cycles: the stage before's, or a teacher of no use any more, go only now.
    gc.collect()
    # By its number: on a network's disk the newest may not be seen by all at once.
    newest = checkpoint.folder_of(session.run, place.step) if place.step else None
    # Adapters and the optimiser are a stage's own: only one that goes on has any to read.
    within = newest if place.stage_step else None
    if newest:
        checkpoint.check(newest, session.processes)
    with checkpoint.dispensable(newest):
        tensors = artifact.read(newest / "model").tensors if newest else session.begins
        student = trained_student(
            config, stage, session.spec, tensors, session.processes,
            checkpoint.read_adapters(within, session.spec, stage.lora_rank)
            if within and stage.lora_rank else None,
        )  # fmt: skip
    if place.step == 0:
        place = _evaluate(session, place, student)
    optimiser = optimiser_for(student, stage, fused=not config.sums_exactly)
    names = {parameter: name for name, parameter in student.named_parameters()}
    if within:
        taken = place.stage_step - place.left_out
        with checkpoint.dispensable(within):
            checkpoint.load_optimiser(within, optimiser, names, taken)
    peak = session.peak_flops
    # A stage's memory is its own: neither the loading of weights nor the stage before counts.
    reset_peak(session.device)
    work = Work(
        session.gradients(stage, student, optimiser), session.batches(stage.cut), optimiser, steps,
        None if peak is None else flops_per_token(stage, session.spec) / peak,
    )  # fmt: skip
    logged = logged_steps(session.run, place)
    guards = Guards.of(config.divergence, config.spike, config.skips, logged)
    estimate = Estimate(stage.kind, steps - place.stage_step, session.say)
    profile = profiled(
        session.run / "profile", f"{place.stage}-{stage.kind}",
        config.profile_steps if session.processes.is_first else 0,
    )  # fmt: skip

    def save(optimiser: torch.optim.Optimizer | None) -> None:
        _wait_together(session, saver)
        if session.processes.is_first:
            # A checkpoint is not to outlast the lines of its steps.
            flush_to_disk(metrics_of(session.run))
        saver.save(place, _trained(session.spec, place), student, optimiser, names)

    with session.stop.held(_noticed(session)):
        try:
            with session.compiled(stage, student), profile as profile_step:
                if within and place.perplexity is None and _evaluation_is_due(config, place, steps):
                    place = _evaluate(session, place, student)
                while place.stage_step < steps:
                    record = one_step(session, place, work, guards.steps.most())
                    profile_step()
                    place = replace(
                        place,
                        stage_step=place.stage_step + 1,
                        step=place.step + 1,
                        tokens=place.tokens + record["step_tokens"],
                        perplexity=None,
                        left_out=place.left_out + ("left_out" in record),
                    )
                    _conclude(session, saver, guards, place, record, steps)
                    estimate.step(record["step_tokens"], record["memory_bytes"])
                    if place.stage_step == steps:
                        break
                    if _evaluation_is_due(config, place, steps):
                        place = _evaluate(session, place, student)
                    if place.step % config.checkpoint_every == 0 and guards.healthy:
                        save(optimiser)
                place = _evaluate(session, place, student)
                if not math.isfinite(place.perplexity or math.nan):
                    raise _not_finite(session, place)
        except (KeyboardInterrupt, Preempted):
            if place.step != saver.saved.step and place.stage_step and not session.stop.is_forced:
                save(optimiser)
            saver.wait()
            raise
        place = replace(place, stage=place.stage + 1, stage_step=0, left_out=0)
        save(None)
    return place


def _conclude(
    session: Session,
    saver: Checkpoints,
    guards: Guards,
    place: Place,
    record: Mapping[str, Any],
    steps: int,
) -> None:
    """After a step: log it, and raise, in all processes at once, what ends the run here."""
    asked = _logged_together(session, {**record, "tokens": place.tokens}, saver)
    guards.add(record)
    if "left_out" in record:
        session.say(f"step {place.step} is left out: {record['left_out']}")
    if guards.steps.gives_up:
        raise _not_finite(session, place, record["left_out"])
    if guards.losses.diverged:
        raise Diverged(session, place, guards.losses)
    session.progress(
        record["stage"], place.stage_step, steps,
        loss=record["loss"] or math.nan, tokens_per_second=record["tokens_per_second"],
    )  # fmt: skip
    stop_if_asked(asked)


def _logged_together(
    session: Session, record: Mapping[str, Any], saver: Checkpoints | None = None
) -> list[float]:
    """Log a line; raise, in all processes, what kept that or a checkpoint from being written.

    Returns the signals that came to any of them (:meth:`Stop.flags`).
    """
    unlogged = None
    try:
        session.log(record)
    except WriteError as error:
        unlogged = error
    unsaved = saver is not None and saver.failed
    failed, *asked = session.processes.sums(
        [float(unsaved or unlogged is not None), *session.stop.flags()]
    )
    if failed:
        if saver is not None:
            saver.wait()
        raise unlogged or EndedByAnother(f"{session.run}: another process could not save")
    return asked


def _wait_together(session: Session, saver: Checkpoints) -> None:
    """Until the checkpoint under way is on disk; raises in all processes when it failed in one."""
    unsaved = None
    try:
        saver.wait()
    except WriteError as error:
        unsaved = error
    (failed,) = session.processes.sums([float(unsaved is not None)])
    if failed:
        raise unsaved or EndedByAnother(f"{session.run}: another process could not save")


def _noticed(session: Session) -> Callable[[], None]:
    return lambda: session.say("stopping, with a checkpoint of the last whole step")


def _evaluation_is_due(config: UptrainConfig, place: Place, steps: int) -> bool:
    """Whether the held-out perplexity is measured here, inside a stage of so many steps."""
    every = config.evaluate_every
    return bool(every) and place.step % every == 0 and 0 < place.stage_step < steps


class Diverged(SupraError):
    """The loss has grown too much; ``place`` is where that was seen."""

    def __init__(self, session: Session, place: Place, guard: LossGuard) -> None:
        self.place = place
        self.grown = f"mean of the last steps {guard.mean:.4g}, before {guard.lowest:.4g}"
        super().__init__(
            f"{session.run}: the loss diverges at step {place.step} ({self.grown}): lower "
            f"stages.{place.stage}.learning_rate in a new run; the last good checkpoint is kept"
        )


def _back(session: Session, saver: Checkpoints, diverged: Diverged) -> Place:
    """The last checkpoint's place, from where other text is read; ``diverged`` if too often."""
    away = diverged.place
    if away.rollbacks >= session.config.rollbacks:
        raise diverged
    saver.wait()
    good = checkpoint.newest_place(session.run, session.processes)
    if session.processes.is_first:
        trim_log(session.run, good)
        for sink in session.sinks:
            sink.go_back(good.step)
    session.log({"went_back_from": away.step, "step": good.step})
    session.say(
        f"the loss diverges at step {away.step} ({diverged.grown}): the run goes on from step "
        f"{good.step}, past the text that it diverged on"
    )
    saver.saved = good
    return replace(
        good,
        passed_over=away.tokens + away.passed_over - good.tokens,
        rollbacks=away.rollbacks + 1,
    )


def _not_finite(
    session: Session, place: Place, why: str = "the held-out perplexity is not finite"
) -> SupraError:
    return SupraError(
        f"{session.run}: training gives up at step {place.step} ({why}): lower "
        f"stages.{place.stage}.learning_rate in a new run; the last good checkpoint is kept"
    )


def _evaluate(session: Session, place: Place, student: SupraModel) -> Place:
    """``place`` with its held-out perplexity, which is written to the metrics."""
    place = replace(place, perplexity=_perplexity(session, student))
    record = {"evaluation": "held_out", "step": place.step, "perplexity": place.perplexity}
    _logged_together(session, {**record, "tokens": place.tokens})
    session.progress("evaluate", 1, 1, perplexity=place.perplexity or math.nan)
    return place


@torch.no_grad()
def _perplexity(session: Session, model: SupraModel) -> float:
    """exp of the mean loss over what can be predicted of the held-out sequences.

    Processes share them; each takes as many, since a sharded model needs all of them to compute.
    """
    rows, every = session.data.held_out(), session.processes
    batches, total, targets = session.batches(1), 0.0, 0.0
    for first in range(0, len(rows), every.crews):
        session.stop_if_asked()
        number = min(first + every.crew, len(rows) - 1)
        row = rows[number : number + 1]
        (batch,) = batches.of(row)
        with session.autocast(), eagerly(session.device):
            loss = next_token_loss(model, batch).item() * (batch.ids.numel() - 1)
        if number == first + every.crew:
            total, targets = total + loss, targets + row.targets / every.sharing
    release(model)
    total, targets = every.sums([total, targets])
    # Far from a language model the mean loss can exceed what exp can hold.
    return math.exp(min(total / targets, 700.0))


def _trained(spec: ModelSpec, place: Place) -> ModelSpec:
    before = spec.provenance
    tokens = before.trained_tokens + place.tokens
    return replace(spec, provenance=replace(before, trained_tokens=tokens))
