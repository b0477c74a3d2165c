"""A plan of a run: memory of a device, time, and cost.

Memory comes from a trace of one uncompiled step, operation by operation. Time comes from a
roofline (Williams et al., 2009, doi:10.1145/1498765.1498785): each operation takes at least the
time of its products at the device's peak, and of its bytes at the device's bandwidth.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from supra_core.conversion.linearize import LinearizeOptions, linear_spec
from supra_core.errors import SupraError
from supra_core.model.layout import parameter_count, tensor_shapes
from supra_core.model.original import original_spec
from supra_core.model.sizes import Sizes, of_spec
from supra_core.model.spec import ModelSpec
from supra_core.progress import Progress, silent
from supra_core.sources.outline import outline
from supra_torch.devices import CPU, Device, device_named
from supra_torch.model.lora import adapter_count
from supra_torch.plan.memory import Layout, StepTrace, trace_stage
from supra_torch.plan.trace import EXCHANGE
from supra_torch.precision import resolved_precision
from supra_torch.recipes.config import Stage, UptrainConfig
from supra_torch.uptrain.inputs import refuse_another_recipe
from supra_torch.uptrain.step.stages import learning_rates

# A CUDA context with the libraries' code and workspaces; the communicators of NCCL beside it.
_CONTEXT, _COMMUNICATORS = 0.7e9, 0.7e9
# What glibc's heap takes besides memory in use: bytes, and a share of that memory, fitted to ten
# runs (docs/results/plan-memory.md).
_HEAP, _HEAP_SHARE = 0.2e9, 0.07
# The share of the roofline that a step attains (docs/results/plan-memory.md).
_ATTAINED = 0.6
# Weights, and the two moments of AdamW of those that are trained, in float32.
_WEIGHT_ITEMSIZE, _MOMENTS_ITEMSIZE = 4, 8
# The time of a trace grows with the parts of a row.
_MOST_DEVICES, _LONGEST = 65_536, 1_048_576
# Settings that may make a run fit, the cheapest first.
_REMEDIES: tuple[dict[str, int | bool], ...] = (
    {"device_rows": 1},
    {"activation_checkpointing": 2},
    {"activation_checkpointing": True},
    {"activation_checkpointing": True, "device_rows": 1},
    {"segment_tokens": 1024, "device_rows": 1},
)


@dataclass(frozen=True)
class StagePlan:
    """One stage: ``steps`` of ``step_tokens``, on all devices together.

    ``parts``: bytes of one device at the peak; ``step_seconds``: of a step, as expected;
    ``least_step_seconds``: of its products and communication at the device's peak;
    ``received_bytes``: from other devices, per step.
    """

    kind: str
    steps: int
    step_tokens: int
    parts: dict[str, int]
    flops_per_token: float
    received_bytes: int
    step_seconds: float
    least_step_seconds: float

    @property
    def bytes(self) -> int:
        """The sum of all parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """A run on ``nodes`` machines with ``gpus`` devices each; ``student`` in bfloat16.

    ``trained``: parameters of the stage that trains most, adapters included; ``remedy``: settings
    that would make the run fit, if it does not and there are some.
    """

    config: UptrainConfig
    device: Device
    gpus: int
    nodes: int
    precision: str
    stages: tuple[StagePlan, ...]
    student: Sizes
    trained: int
    remedy: dict[str, int | bool] | None

    @property
    def bytes(self) -> int:
        """The peak of a device over all stages."""
        return max(stage.bytes for stage in self.stages)

    @property
    def device_bytes(self) -> int:
        """Memory of a device; processes on a CPU share the machine's."""
        shared = self.gpus if self.device.kind == CPU else 1
        return int(self.device.memory / shared)

    @property
    def fits(self) -> bool:
        """Whether every stage fits the device."""
        return self.bytes <= self.device_bytes

    @property
    def seconds(self) -> float:
        """Expected time of all steps."""
        return sum(stage.steps * stage.step_seconds for stage in self.stages)

    @property
    def least_seconds(self) -> float:
        """Time of all steps at the device's peak."""
        return sum(stage.steps * stage.least_step_seconds for stage in self.stages)

    @property
    def device_hours(self) -> float:
        """Hours times the number of devices."""
        return self.seconds / 3600 * self.gpus * self.nodes

    @property
    def checkpoint_bytes(self) -> int:
        """Size of a checkpoint in the stage that trains most."""
        return self.student.parameters * _WEIGHT_ITEMSIZE + self.trained * _MOMENTS_ITEMSIZE


def plan(
    config: UptrainConfig,
    *,
    gpu: str,
    gpus: int = 1,
    nodes: int = 1,
    progress: Progress = silent,
) -> Plan:
    """Plan a run of ``config``; no weights are read and no such device is needed.

    ``gpu``: a name of :data:`~supra_torch.devices.DEVICES`, or ``cpu``. Raises SupraError
    when the config does not fit its model or the devices cannot share its batches.
    """
    for option, number in (("gpus", gpus), ("nodes", nodes)):
        if number < 1:
            raise SupraError(f"`{option}` is {number}: must be at least 1")
    if gpus * nodes > _MOST_DEVICES:
        raise SupraError(f"{gpus * nodes} devices are too many: plan at most {_MOST_DEVICES}")
    if config.sequence_length > _LONGEST:
        raise SupraError(
            f"field sequence_length is {config.sequence_length}: a plan takes at most {_LONGEST}"
        )
    config.refuse_uneven(gpus * nodes)
    student, teacher = _specs(config)
    precision = str(config.precision)
    if gpu.lower() == CPU:
        precision = resolved_precision(precision, torch.device(CPU))
    elif precision == "auto":
        precision = "bf16"
    planner = _Planner(device_named(gpu, precision), gpus, nodes, precision, student, teacher)
    found = planner.stages(config, progress)
    made = Plan(
        config, planner.device, gpus, nodes, precision, tuple(found),
        of_spec(student, 2 * parameter_count(student)),
        max(_trained(stage, student) for stage in config.stages), None,
    )  # fmt: skip
    return made if made.fits else planner.with_remedy(made, progress)


def _trained(stage: Stage, spec: ModelSpec) -> int:
    """The number of parameters with optimiser state."""
    rate_of = learning_rates(stage, spec)
    shapes = tensor_shapes(spec)
    count = sum(math.prod(shape) for name, shape in shapes.items() if rate_of(name))
    return count + (0 if stage.lora_rank is None else adapter_count(spec, stage.lora_rank))


def _specs(config: UptrainConfig) -> tuple[ModelSpec, ModelSpec | None]:
    """Specs of the student, and of the teacher if a stage learns from one."""
    model = outline(config.model)
    student = model
    if model.is_transformer:
        student = linear_spec(model, LinearizeOptions(**config.linearize.model_dump()))
    refuse_another_recipe(config, model)
    if not config.needs_teacher:
        return student, None
    return student, original_spec(model) if config.teacher is None else outline(config.teacher)


@dataclass(frozen=True)
class _Planner:
    device: Device
    gpus: int
    nodes: int
    precision: str
    student: ModelSpec
    teacher: ModelSpec | None

    def stages(self, config: UptrainConfig, progress: Progress) -> Iterator[StagePlan]:
        """Every stage of ``config``."""
        steps, where = config.stage_steps(), self._layout(config)
        for number, (stage, count) in enumerate(zip(config.stages, steps, strict=True)):
            progress("plan", number, len(steps))
            traced = trace_stage(config, stage, self.student, self.teacher, self.precision, where)
            yield self._stage(config, stage, count, traced, where, first=number == 0)
        progress("plan", len(steps), len(steps))

    def with_remedy(self, made: Plan, progress: Progress) -> Plan:
        """The plan with the first remedy that makes it fit, if any."""
        for remedy in _REMEDIES:
            if all(getattr(made.config, name) == value for name, value in remedy.items()):
                continue
            whole = made.config.sums_exactly or made.config.context_parallel > 1
            if whole and "segment_tokens" in remedy:
                continue
            changed = made.config.model_copy(update=remedy)
            largest = max(self.stages(changed, progress), key=lambda stage: stage.bytes)
            if largest.bytes <= made.device_bytes:
                return replace(made, remedy=remedy)
        return made

    def _layout(self, config: UptrainConfig) -> Layout:
        together = config.devices_together or self.gpus
        if self.gpus * self.nodes % together:
            raise SupraError(
                f"devices_together {together} does not divide {self.gpus * self.nodes} devices: "
                "set a divisor"
            )
        devices = self.gpus * self.nodes
        return Layout(devices, together, self.device.kind, config.context_parallel)

    def _stage(
        self,
        config: UptrainConfig,
        stage: Stage,
        steps: int,
        traced: StepTrace,
        where: Layout,
        *,
        first: bool,
    ) -> StagePlan:
        device, tokens = self.device, math.prod(config.batch_shape(stage))
        peak = device.products(self.precision)
        flops = sum(cost.flops * count for cost, count in traced.costs.items())
        roofline = sum(
            count * max(cost.flops / peak, cost.moved / device.bandwidth)
            for cost, count in traced.costs.items()
        )
        communication, exchange = self._communication(where, traced)
        parts = {**traced.parts, **self._around(config, steps, traced, first=first)}
        return StagePlan(
            kind=stage.kind,
            steps=steps,
            step_tokens=tokens,
            parts=parts,
            flops_per_token=flops * self.gpus * self.nodes / tokens,
            received_bytes=sum(traced.sent.values()),
            # What FSDP sends is sent meanwhile; what a shared row's parts exchange is waited for.
            step_seconds=max(roofline / _ATTAINED, communication) + exchange,
            least_step_seconds=max(flops / peak, communication) + exchange,
        )

    def _communication(self, where: Layout, traced: StepTrace) -> tuple[float, float]:
        """Seconds per step that FSDP sends (in a group, and between), and that parts of rows do."""

        def link(devices: int) -> float:
            return self.device.link if devices <= self.gpus else self.device.network

        between = sum(size for name, size in traced.sent.items() if "allreduce" in name)
        parts = sum(size for name, size in traced.sent.items() if EXCHANGE in name)
        within = sum(traced.sent.values()) - between - parts
        sharded = within / link(where.together) + between / self.device.network
        return sharded, parts / link(where.sharing)

    def _around(
        self, config: UptrainConfig, steps: int, traced: StepTrace, *, first: bool
    ) -> dict[str, int]:
        """Memory besides that of a step."""
        if self.device.kind != CPU:
            many = self.gpus * self.nodes > 1
            return {"runtime": int(_CONTEXT + many * _COMMUNICATORS)}
        around = {"runtime": _resident(), "heap": int(_HEAP + _HEAP_SHARE * traced.bytes)}
        copied = ["weights", "optimiser"] if steps > config.checkpoint_every else ["weights"]
        if steps > config.checkpoint_every or not first:
            # A copy of what is being written while training continues.
            around["checkpoint"] = sum(traced.parts.get(part, 0) for part in copied)
        return around


def _resident() -> int:
    """Resident bytes of this process, which has loaded a run's libraries."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[1])
    except OSError:
        return int(0.4e9)
    return pages * 4096


def in_order(stages: Sequence[StagePlan]) -> list[str]:
    """The parts of all stages, largest first."""
    names = {name for stage in stages for name in stage.parts}
    return sorted(names, key=lambda name: -max(stage.parts.get(name, 0) for stage in stages))
