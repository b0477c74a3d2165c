"""One stage of a run: begin or resume, step, evaluate, checkpoint, end."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from supra_core.artifact import folder as artifact
from supra_core.errors import Preempted, SupraError
from supra_core.formats.atomic import flush_to_disk
from supra_torch.devices import recognised
from supra_torch.distributed.exact import clip_gradients
from supra_torch.distributed.sharding import trained_student
from supra_torch.model.model import SupraModel
from supra_torch.run_folder import checkpoint
from supra_torch.run_folder.checkpoint import Checkpoints, Place
from supra_torch.run_folder.folder import logged_steps, metrics_of
from supra_torch.uptrain import evaluation
from supra_torch.uptrain.estimate import Estimate
from supra_torch.uptrain.gradients import StageModels, compiled, stage_gradients
from supra_torch.uptrain.guard import Guards, LossGuard
from supra_torch.uptrain.inputs import Inputs
from supra_torch.uptrain.interrupts import stop_if_asked
from supra_torch.uptrain.memory import peak_memory, reset_peak
from supra_torch.uptrain.profile import profiled
from supra_torch.uptrain.session import Session
from supra_torch.uptrain.step.data import Mixture
from supra_torch.uptrain.step.operations import flops_per_token
from supra_torch.uptrain.step.stages import optimiser_for
from supra_torch.uptrain.step.step import (
    Clip,
    StepResult,
    clip_by_norm,
    learning_rate_factor,
    training_step,
)


@dataclass(frozen=True)
class Training:
    """What all stages of a run share; ``teacher`` is None where no stage needs it."""

    session: Session
    inputs: Inputs
    data: Mixture
    saver: Checkpoints
    teacher: SupraModel | None


class Diverged(SupraError):
    """The loss has grown too much; ``place`` is where that was seen."""

    def __init__(self, session: Session, place: Place, guard: LossGuard) -> None:
        self.place = place
        self.grown = f"mean of the last steps {guard.mean:.4g}, before {guard.lowest:.4g}"
        super().__init__(
            f"{session.run}: the loss diverges at step {place.step} ({self.grown}): lower "
            f"stages.{place.stage}.learning_rate in a new run; the last good checkpoint is kept"
        )


class StageRun:
    """Trains the stage of ``place`` from there to its end."""

    def __init__(self, training: Training, place: Place) -> None:
        self._session, self._data = training.session, training.data
        self._inputs, self._saver = training.inputs, training.saver
        self.place = place
        config = self._session.config
        self._stage = config.stages[place.stage]
        self._steps = config.stage_steps()[place.stage]
        self._begin(training.teacher)

    def run(self) -> Place:
        """Returns the place where the next stage begins.

        Raises Diverged, SupraError when training gives up, and KeyboardInterrupt or Preempted
        once the last whole step is in a checkpoint.
        """
        session, saver, config = self._session, self._saver, self._session.config
        profile = profiled(
            session.run / "profile", f"{self.place.stage}-{self._stage.kind}",
            config.profile_steps if session.processes.is_first else 0,
        )  # fmt: skip

        # No method: the session would keep this stage's models in memory.
        def tell() -> None:
            session.say("stopping after this step, with a checkpoint")

        with session.stop.held(tell):
            try:
                with compiled(session, self._models), profile as profile_step:
                    if self._resumed and self.place.perplexity is None and self._evaluation_is_due:
                        self._evaluate()
                    while self.place.stage_step < self._steps:
                        self._step(profile_step)
                        if self.place.stage_step == self._steps:
                            break
                        if self._evaluation_is_due:
                            self._evaluate()
                        due = self.place.step % config.checkpoint_every == 0
                        if due and self._guards.healthy:
                            self._checkpoint(self._optimiser)
                    self._evaluate()
                    if not math.isfinite(self.place.perplexity or math.nan):
                        raise self._gives_up("the held-out perplexity is not finite")
            except (KeyboardInterrupt, Preempted):
                moved = self.place.step != saver.saved.step and self.place.stage_step
                if moved and not session.stop.is_forced:
                    self._checkpoint(self._optimiser)
                saver.wait()
                raise
            return self._end()

    # --- the phases ---------------------------------------------------------------------------

    def _begin(self, teacher: SupraModel | None) -> None:
        """Load what the stage begins with, or what its last checkpoint holds."""
        session, place, stage = self._session, self.place, self._stage
        session.save_together(self._saver.wait)
        # Sharded modules are cycles: those of the stage before, or a teacher that is of no further
        # use, are freed only now.
        gc.collect()
        # By its number: on a network's disk the newest may not be seen by all at once.
        newest = checkpoint.folder_of(session.run, place.step) if place.step else None
        # Adapters and the optimiser are a stage's own: only a resumed one has any to read.
        self._resumed = newest if place.stage_step else None
        if newest:
            checkpoint.check(newest, session.processes)
        student = self._load(newest, self._resumed)
        self._models = StageModels(stage, student, teacher)
        if place.step == 0:
            self._evaluate()
        optimiser = optimiser_for(student, stage, fused=not session.config.sums_exactly)
        self._optimiser = optimiser
        self._names = {parameter: name for name, parameter in student.named_parameters()}
        if self._resumed:
            taken = place.stage_step - place.left_out
            with checkpoint.dispensable(self._resumed):
                checkpoint.load_optimiser(self._resumed, optimiser, self._names, taken)
        # A stage's memory is its own: neither the loading of weights nor the stage before counts.
        reset_peak(session.device)
        self._compute = stage_gradients(session, self._models, optimiser)
        self._clip: Clip = clip_by_norm
        if session.config.sums_exactly:
            self._clip = partial(clip_gradients, processes=session.processes)
        self._batches = evaluation.batches_of(session, self._data, stage.cut)
        peak = _peak_flops(session)
        self._busy_seconds = peak and flops_per_token(stage, self._inputs.student_spec) / peak
        config, logged = session.config, logged_steps(session.run, self.place)
        self._guards = Guards.of(config.divergence, config.spike, config.skips, logged)
        self._estimate = Estimate(stage.kind, self._steps - place.stage_step, session.say)

    def _step(self, profile_step: Callable[[], None]) -> None:
        """One optimiser step, logged; raise, in all processes at once, what ends the run here."""
        session, place = self._session, self.place
        record = self._train()
        profile_step()
        self.place = place = replace(
            place,
            stage_step=place.stage_step + 1,
            step=place.step + 1,
            tokens=place.tokens + record["step_tokens"],
            perplexity=None,
            left_out=place.left_out + ("left_out" in record),
        )
        asked = self._log(record)
        self._guards.add(record)
        if "left_out" in record:
            session.say(f"step {place.step} is skipped: {record['left_out']}")
        if self._guards.steps.gives_up:
            raise self._gives_up(record["left_out"])
        if self._guards.losses.diverged:
            raise Diverged(session, place, self._guards.losses)
        session.progress(
            record["stage"], place.stage_step, self._steps,
            loss=record["loss"] or math.nan, tokens_per_second=record["tokens_per_second"],
        )  # fmt: skip
        stop_if_asked(asked)
        self._estimate.step(record["step_tokens"], record["memory_bytes"])

    def _evaluate(self) -> None:
        """Measure and log the held-out perplexity of the student."""
        session = self._session
        perplexity = evaluation.held_out_perplexity(session, self._data, self._models.student)
        self.place = replace(self.place, perplexity=perplexity)
        step = self.place.step
        self._log({"evaluation": "held_out", "step": step, "perplexity": perplexity})
        session.progress("evaluate", 1, 1, perplexity=perplexity or math.nan)

    def _checkpoint(self, optimiser: torch.optim.Optimizer | None) -> None:
        """Begin to write a checkpoint; ``optimiser`` is None between two stages."""
        session, spec = self._session, self._inputs.student_spec
        session.save_together(self._saver.wait)
        if session.processes.is_first:
            # A checkpoint must not outlast the lines of its steps.
            flush_to_disk(metrics_of(session.run))
        tokens = spec.provenance.trained_tokens + self.place.tokens
        trained = replace(spec, provenance=replace(spec.provenance, trained_tokens=tokens))
        self._saver.save(self.place, trained, self._models.student, optimiser, self._names)

    def _end(self) -> Place:
        self.place = replace(self.place, stage=self.place.stage + 1, stage_step=0, left_out=0)
        self._checkpoint(None)
        return self.place

    # --- their parts --------------------------------------------------------------------------

    def _load(self, newest: Path | None, resumed: Path | None) -> SupraModel:
        session, stage, inputs = self._session, self._stage, self._inputs
        with checkpoint.dispensable(newest):
            adapters = None
            if resumed and stage.lora_rank:
                adapters = checkpoint.read_adapters(resumed, inputs.student_spec, stage.lora_rank)
            tensors = artifact.read(newest / "model").tensors if newest else inputs.student_tensors
            return trained_student(
                session.config, stage, inputs.student_spec, tensors, session.processes, adapters
            )

    def _train(self) -> dict[str, Any]:
        """Read this step's text and train on it; returns its line of metrics."""
        session, place, stage = self._session, self.place, self._stage
        every, most, began = session.processes, self._guards.steps.most(), time.perf_counter()
        rows, _ = session.config.batch_shape(stage)
        read = place.tokens + place.passed_over
        own = self._data.batch(read, rows, stage.cut, every.share(rows))
        parts = self._batches.of(own)
        loaded = time.perf_counter()
        factor = learning_rate_factor(
            place.stage_step, self._steps, stage.warmup, stage.final_learning_rate
        )
        result = training_step(
            lambda: self._compute(parts),
            self._optimiser,
            learning_rate_factor=factor,
            clip=stage.clip,
            mean=lambda loss: every.sums([loss])[0] / every.size,
            most=most,
            clip_gradients=self._clip,
        )
        seconds, tokens = time.perf_counter() - began, own.ids.size * every.data_parallel_size
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
        if self._busy_seconds is not None:
            record["mfu"] = self._busy_seconds * tokens / seconds
        if not result.taken:
            record["left_out"] = _complaint(result, most)
        return record

    def _log(self, record: Mapping[str, Any]) -> list[float]:
        """Log a line; returns the signals that came. Raises, in all, what failed in any."""

        def log() -> None:
            self._session.log({**record, "tokens": self.place.tokens})
            self._saver.raise_if_failed()

        return self._session.save_together(log)

    @property
    def _evaluation_is_due(self) -> bool:
        every, place = self._session.config.evaluate_every, self.place
        return bool(every) and place.step % every == 0 and 0 < place.stage_step < self._steps

    def _gives_up(self, why: str) -> SupraError:
        return SupraError(
            f"{self._session.run}: training gives up at step {self.place.step} ({why}): lower "
            f"stages.{self.place.stage}.learning_rate in a new run; the last good checkpoint is "
            "kept"
        )


def _peak_flops(session: Session) -> float | None:
    """Operations a second of all devices together; None where the data sheet is unknown."""
    if session.device.type != "cuda":
        return None
    known = recognised(torch.cuda.get_device_name(session.device))
    return None if known is None else known.products(session.precision) * session.processes.size


def _number(value: float) -> float | None:
    """None for what JSON has no number for."""
    return value if math.isfinite(value) else None


def _complaint(result: StepResult, most: float) -> str:
    """Why a step is skipped."""
    if not math.isfinite(result.loss) or not math.isfinite(result.norm):
        return f"loss {result.loss:.4g} and gradient norm {result.norm:.4g} are not both finite"
    return f"its gradient norm {result.norm:.4g} is above {most:.4g}"
