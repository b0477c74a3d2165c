"""The stages of a run, one after the other, and the way back when one diverges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from supra_core.errors import FormatError
from supra_torch.distributed.sharding import frozen_teacher
from supra_torch.model.model import SupraModel
from supra_torch.run_folder import checkpoint
from supra_torch.run_folder.checkpoint import Checkpoints, Place
from supra_torch.run_folder.folder import logged_teacher_perplexity, trim_log
from supra_torch.uptrain import evaluation
from supra_torch.uptrain.inputs import Inputs
from supra_torch.uptrain.session import Session
from supra_torch.uptrain.stage import Diverged, StageRun, Training
from supra_torch.uptrain.step.data import Mixture


def train(session: Session, inputs: Inputs, data: Mixture, place: Place) -> dict[str, Any]:
    """Train from ``place`` to the end; returns the run's summary."""
    teacher, held_out = _teacher(session, inputs, data, place)
    if place.step == 0:
        session.log({"evaluation": "held_out", "teacher_perplexity": held_out, "step": 0})
    saver = Checkpoints(
        session.run, session.processes, inputs.student_assets, session.config.keep_checkpoints,
        place,
    )  # fmt: skip
    training = Training(session, inputs, data, saver, teacher)
    steps = session.config.stage_steps()
    _refuse_elsewhere(session, place, steps)
    try:
        while place.stage < len(steps):
            try:
                place = StageRun(training, place).run()
            except Diverged as diverged:
                place = _rolled_back(session, saver, diverged)
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
    """Raise FormatError when the checkpoint's place is not one of this run's."""
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


def _teacher(
    session: Session, inputs: Inputs, data: Mixture, place: Place
) -> tuple[SupraModel | None, float | None]:
    """The teacher, None where no stage learns from it, and its held-out perplexity.

    A resumed run has its perplexity in the log, as rank 0 sees it.
    """
    if inputs.teacher is None:
        return None, None
    logged = None
    if place.step and session.processes.is_first:
        logged = logged_teacher_perplexity(session.run)
    (agreed,) = session.processes.sums([logged or 0.0])
    held_out, needed = agreed or None, session.config.needs_teacher
    if held_out is not None and not needed:
        return None, held_out
    model = frozen_teacher(*inputs.teacher, session.precision, session.processes)
    if held_out is None:
        held_out = evaluation.held_out_perplexity(session, data, model)
    return (model if needed else None), held_out


def _rolled_back(session: Session, saver: Checkpoints, diverged: Diverged) -> Place:
    """The last checkpoint's place, to continue with other text; ``diverged`` if too often."""
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
        f"the loss diverges at step {away.step} ({diverged.grown}): the run continues from step "
        f"{good.step} and skips the text that it diverged on"
    )
    saver.saved = good
    return replace(
        good,
        passed_over=away.tokens + away.passed_over - good.tokens,
        rollbacks=away.rollbacks + 1,
    )
