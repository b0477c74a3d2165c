"""Memory of a device in a step of a stage, by part, from a trace of the step itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from supra_core.model.spec import ModelSpec
from supra_torch.distributed.exact import Float64Sums
from supra_torch.distributed.processes import Processes, mesh_over, part_of_rows
from supra_torch.distributed.sharding import meta_model, placed, settle, synchronise
from supra_torch.model import lora
from supra_torch.model.model import SupraModel
from supra_torch.ops.target import planned_for
from supra_torch.plan.trace import Cost, Trace
from supra_torch.precision import autocast, product_type
from supra_torch.recipes.config import Stage, UptrainConfig
from supra_torch.uptrain.step.batches import Batch
from supra_torch.uptrain.step.stages import gradients, optimiser_for
from supra_torch.uptrain.step.step import trained_parameters


@dataclass(frozen=True)
class Layout:
    """The devices of a run: ``devices`` in all, models sharded over ``together`` of them.

    ``sharing``: devices that share each row.
    """

    devices: int
    together: int
    device_type: str
    sharing: int = 1


@dataclass(frozen=True)
class StepTrace:
    """A device's ``parts`` in bytes at the peak, and what a step costs.

    ``sent``: bytes received from other devices, by operation.
    """

    parts: dict[str, int]
    costs: Counter[Cost]
    sent: Counter[str]

    @property
    def bytes(self) -> int:
        """The sum of all parts."""
        return sum(self.parts.values())


def trace_stage(
    config: UptrainConfig,
    stage: Stage,
    student_spec: ModelSpec,
    teacher_spec: ModelSpec | None,
    precision: str,
    where: Layout,
) -> StepTrace:
    """Trace one step of the stage on one of the devices; this machine needs none of them.

    ``teacher_spec``: None for a run without a teacher. Raises SupraError when the stage trains
    nothing.
    """
    rows, length = config.batch_shape(stage)
    own = rows * where.sharing // where.devices
    student, teacher = _student(config, stage, student_spec), None
    if teacher_spec is not None:
        teacher = meta_model(teacher_spec, dtype=product_type(precision))
        teacher.eval().requires_grad_(False)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    exactly = config.sums_exactly
    with _processes(where, exactly) as one, fake, planned_for(where.device_type):
        placed(student, one, torch.float64 if exactly else None)
        if teacher is not None:
            placed(teacher, one)
        trace = Trace()
        trace.label(_all(student), "weights")
        trace.label(_all(teacher), "teacher")
        with trace:
            optimiser = optimiser_for(student, stage, fused=not exactly)
            _warm(optimiser, trace)
            if one.mesh is not None:
                for model in filter(None, (student, teacher)):
                    settle(model)
            trace.costs.clear()
            trace.sent.clear()
            began = trace.now()
            trained = list(trained_parameters(optimiser))
            sums = Float64Sums(trained) if exactly and one.mesh is None else None
            for count, size, last in _turns(own, config.rows_together or own):
                trace.repeats = count
                synchronise(student, last)
                ids = torch.zeros(size, length, dtype=torch.long)
                batch = Batch(ids, part=one.part)
                with autocast(one.device, precision, sharded=one.mesh is not None):
                    gradients(
                        stage.kind, student, teacher, batch, size / own, config.segment_tokens
                    )
                if sums is not None:
                    sums.add()
                    trace.label(sums.tensors(), "gradients")
            if sums is not None:
                sums.put_back()
            trace.repeats = 1
            trace.label((parameter.grad for parameter in trained), "gradients")
            nn.utils.clip_grad_norm_(trained, stage.clip)
            optimiser.step()
        if exactly and where.together == where.devices:
            # Along an axis of one there is nobody to sum with.
            for name in [name for name in trace.sent if "allreduce" in name]:
                del trace.sent[name]
        return StepTrace(trace.peak(began), trace.costs, trace.sent)


def _turns(rows: int, at_once: int) -> list[tuple[int, int, bool]]:
    """The turns of a device over its rows: (how many, rows in each, whether the last).

    The first makes the gradients and the last shares them; those between are alike.
    """
    sizes = [min(at_once, rows - start) for start in range(0, rows, at_once)]
    if len(sizes) < 3:
        return [(1, size, place == len(sizes)) for place, size in enumerate(sizes, 1)]
    return [(1, at_once, False), (len(sizes) - 2, at_once, False), (1, sizes[-1], True)]


def _student(config: UptrainConfig, stage: Stage, spec: ModelSpec) -> SupraModel:
    adapters = None
    if stage.lora_rank is not None:
        adapters = lora.Adapters(stage.lora_rank, stage.lora_alpha, {})
    student = meta_model(spec, dtype=torch.float32, adapters=adapters).train()
    student.activation_checkpointing = config.activation_checkpointing
    return student


def _warm(optimiser: torch.optim.Optimizer, trace: Trace) -> None:
    """Let the optimiser create its state, as the first step does."""
    for parameter in trained_parameters(optimiser):
        parameter.grad = torch.empty_like(parameter)
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    for state in optimiser.state.values():
        trace.label((x for x in state.values() if isinstance(x, torch.Tensor)), "optimiser")


def _all(model: nn.Module | None) -> Iterator[torch.Tensor]:
    if model is not None:
        yield from model.parameters()
        yield from model.buffers()


@contextmanager
def _processes(where: Layout, two_axes: bool) -> Iterator[Processes]:
    """One of several processes of which the others do not exist: what it sends is lost."""
    cpu = torch.device("cpu")
    if where.devices == 1:
        yield Processes(0, 1, cpu)
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=where.devices)
    try:
        mesh = mesh_over("cpu", where.devices, where.together, two_axes=two_axes)
        part = part_of_rows(0, where.sharing)
        yield Processes(0, where.devices, cpu, mesh, part=part)
    finally:
        dist.destroy_process_group()
