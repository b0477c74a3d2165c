"""What a run needs at every step: its config, its processes, its data, its models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from supra_core.model.spec import ModelSpec
from supra_core.progress import Progress
from supra_core.tensors import LazyTensor
from supra_torch.devices import recognised
from supra_torch.distributed.exact import Float64Sums, clip_gradients
from supra_torch.distributed.processes import Processes
from supra_torch.distributed.sharding import synchronise
from supra_torch.model.model import SupraModel
from supra_torch.precision import autocast
from supra_torch.recipes.config import Stage, UptrainConfig
from supra_torch.run_folder.folder import log
from supra_torch.uptrain.interrupts import Stop, stop_if_asked
from supra_torch.uptrain.step.batches import Batch, Batches
from supra_torch.uptrain.step.capture import CapturedGradients, Gradients
from supra_torch.uptrain.step.compilation import compiled_layers, compiles, eagerly
from supra_torch.uptrain.step.data import Mixture
from supra_torch.uptrain.step.stages import gradients
from supra_torch.uptrain.step.step import clip_by_norm, trained_parameters
from supra_torch.uptrain.watch import Sink, figures


@dataclass(frozen=True)
class Session:
    """Everything that does not change while a run goes on.

    ``spec`` and ``begins``: the student as it begins, before any step.
    """

    config: UptrainConfig
    run: Path
    processes: Processes
    stop: Stop
    precision: str
    data: Mixture
    teacher: SupraModel | None
    spec: ModelSpec
    begins: Mapping[str, LazyTensor]
    assets: Mapping[str, bytes]
    progress: Progress
    say: Callable[[str], None]
    sinks: Sequence[Sink] = ()

    @property
    def device(self) -> torch.device:
        return self.processes.device

    @property
    def peak_flops(self) -> float | None:
        """Operations a second of all devices together; None where a data sheet is missing."""
        if self.device.type != "cuda":
            return None
        known = recognised(torch.cuda.get_device_name(self.device))
        return None if known is None else known.products(self.precision) * self.processes.size

    def autocast(self) -> torch.autocast:
        sharded = self.processes.mesh is not None
        return autocast(self.device, self.precision, sharded=sharded)

    @property
    def compiles(self) -> bool:
        """Whether steps are compiled, and on a single GPU captured, but for mixtures of experts."""
        return compiles(self.config.compile, self.device)

    def compiled(self, stage: Stage, student: SupraModel) -> AbstractContextManager[object]:
        """Inside, the stage's steps are compiled if the run compiles."""
        if not self.compiles:
            return eagerly(self.device)
        segments = self.config.in_segments(stage)
        return compiled_layers(stage.kind, student, self.teacher, segments=segments)

    def gradients(
        self, stage: Stage, student: SupraModel, optimiser: torch.optim.Optimizer
    ) -> Gradients:
        """What a step of the stage computes of this process's part of a batch."""

        alone, exactly = self.processes.mesh is None, self.config.sums_exactly
        captured = self.compiles and self.device.type == "cuda" and alone and not exactly
        captured = captured and self.spec.experts is None
        sums = Float64Sums(list(trained_parameters(optimiser))) if exactly and alone else None
        every = self.processes
        # FSDP takes means over processes, of which some may share rows, but sums where each row is
        # to count the same wherever.
        divisor = every.size if exactly else 1

        def compute(batches: Sequence[Batch]) -> Tensor:
            rows = sum(len(batch.ids) for batch in batches) * divisor
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for number, batch in enumerate(batches, start=1):
                if number > 1 and not captured:
                    self.stop_if_asked()
                synchronise(student, number == len(batches))
                with self.autocast():
                    share = every.sharing * len(batch.ids) / rows
                    total += gradients(
                        stage.kind, student, self.teacher, batch, share,
                        self.config.segment_tokens,
                    )  # fmt: skip
                if sums is not None:
                    sums.add()
            if sums is not None:
                sums.leave()
            return total * divisor

        if not captured:
            return compute
        return CapturedGradients(compute, list(trained_parameters(optimiser)), self.say)

    def batches(self, cut: int) -> Batches:
        """Puts rows on the device, for a stage that cuts sequences so."""
        config, part = self.config, self.processes.part
        return Batches(self.data, cut, config.rows_together, self.device, part)

    def clip_gradients(self, parameters: Sequence[nn.Parameter], most: float) -> float:
        """Scale gradients to a norm of at most ``most``; returns the norm that they had."""
        if self.config.sums_exactly:
            return clip_gradients(parameters, most, self.processes)
        return clip_by_norm(parameters, most)

    def log(self, record: Mapping[str, Any]) -> None:
        """One line in metrics.jsonl and where else figures are reported, by the first process."""
        if not self.processes.is_first:
            return
        log(self.run, record)
        for sink in self.sinks:
            sink.add(record["step"], figures(record))

    def stop_if_asked(self) -> None:
        """Raise, in all processes, what signals to any of them ask for; called by all."""
        if self.stop.is_held:
            stop_if_asked(self.processes.sums(self.stop.flags()))
