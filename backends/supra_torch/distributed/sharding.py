"""Models that no process holds whole: FSDP2 over the processes, each reading its own rows.

https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html

Weights are gathered in their own type and products taken by autocast, so that one process and
many compute the same; gradients are reduced in float32, the type of trained weights, unless
another is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from supra_core.model import layout
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor
from supra_torch.distributed.processes import Processes
from supra_torch.model import lora
from supra_torch.model.model import SupraModel, numbers, to_torch
from supra_torch.model.trunk import Layer
from supra_torch.precision import product_type
from supra_torch.recipes.config import Stage, UptrainConfig


def load_model(
    spec: ModelSpec,
    tensors: Mapping[str, LazyTensor],
    processes: Processes,
    *,
    dtype: torch.dtype,
    adapters: lora.Adapters | None = None,
    reduce_dtype: torch.dtype | None = None,
) -> SupraModel:
    """The module on its device, with this process's part of the weights.

    ``adapters``: of a stage that trains them, by their names in the module. ``reduce_dtype``: as
    :func:`placed`. Raises LayoutError when names or shapes differ from the spec's.
    """
    layout.check_tensors(spec, {name: t.shape for name, t in tensors.items()}, "the model")
    model = placed(meta_model(spec, dtype=dtype, adapters=adapters), processes, reduce_dtype)
    named = {**tensors, **(adapters.tensors if adapters else {})}
    for name, parameter in model.named_parameters():
        fill(parameter, named[lora.canonical(name)])
    if processes.mesh is not None:
        settle(model)
    return model


def meta_model(
    spec: ModelSpec, *, dtype: torch.dtype, adapters: lora.Adapters | None = None
) -> SupraModel:
    """The module without memory for its weights, each of the type that it is to have."""
    with torch.device("meta"):
        model = SupraModel(spec)
        if adapters is not None:
            lora.attach(model, adapters)
    for name, parameter in model.named_parameters():
        keep = name.endswith(layout.FLOAT32_SUFFIXES) or lora.is_adapter(name)
        parameter.data = parameter.data.to(torch.float32 if keep else dtype)
    return model


def placed(
    model: SupraModel, processes: Processes, reduce_dtype: torch.dtype | None = None
) -> SupraModel:
    """The module of :func:`meta_model` with memory on this process's device, for its part of it.

    ``reduce_dtype``: gradients are summed over processes in it, instead of the mean in their own.
    """
    if processes.mesh is not None:
        _shard(model, processes.mesh, reduce_dtype)
    return model.to_empty(device=processes.device)


def trained_student(
    config: UptrainConfig,
    stage: Stage,
    spec: ModelSpec,
    tensors: Mapping[str, LazyTensor],
    processes: Processes,
    adapters: Mapping[str, LazyTensor] | None = None,
) -> SupraModel:
    """The student of a stage; ``adapters``: as they were saved, None for new ones."""
    added = None
    if stage.lora_rank is not None:
        if adapters is None:
            adapters = lora.begun(spec, stage.lora_rank, config.seed)
        added = lora.Adapters(stage.lora_rank, stage.lora_alpha, adapters)
    student = load_model(
        spec, tensors, processes, dtype=torch.float32, adapters=added,
        reduce_dtype=torch.float64 if config.sums_exactly else None,
    ).train()  # fmt: skip
    student.activation_checkpointing = config.activation_checkpointing
    return student


def frozen_teacher(
    spec: ModelSpec, tensors: Mapping[str, LazyTensor], precision: str, processes: Processes
) -> SupraModel:
    """The teacher, in the type of its matrix products."""
    teacher = load_model(spec, tensors, processes, dtype=product_type(precision))
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def fill(tensor: Tensor, source: LazyTensor) -> None:
    """Copy ``source`` into a tensor, or into the part of it that this process holds."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(to_torch(source))
        return
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    if 0 not in shape:
        tensor.to_local().copy_(numbers(source.rows(offset[0], offset[0] + shape[0])))


def _shard(model: SupraModel, mesh: DeviceMesh, reduce_dtype: torch.dtype | None) -> None:
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(layer, "mix")
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "hidden")
    if reduce_dtype is not None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)


def settle(model: SupraModel) -> None:
    """Let FSDP know its root, before a layer is called by itself: its first forward would."""
    assert isinstance(model, FSDPModule)
    model._get_fsdp_state()._lazy_init()


def release(model: nn.Module) -> None:
    """Free weights that were gathered for a forward without a backward."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(module: SupraModel | Layer) -> Iterator[None]:
    """The module's own weights are whole inside, for forwards that are not its own method's."""
    if not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    try:
        yield
    finally:
        module.reshard()


def synchronise(model: nn.Module, wanted: bool) -> None:
    """Whether backward reduces gradients over groups of processes, or leaves that to a later one.

    Inside a group they are always reduced: whole ones of a 7B model would fill 29 GB of a device.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(wanted)
