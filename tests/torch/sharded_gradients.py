"""Gradients of one batch in one process of several: what test_sharded_gradients starts.

python -m tests.torch.sharded_gradients RANK PROCESSES TOGETHER STORE OUT
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.tensors import LazyTensor
from supra_torch.distributed.processes import Processes, mesh_over
from supra_torch.distributed.sharding import load_model, synchronise
from supra_torch.model import lora
from supra_torch.precision import autocast, product_type
from supra_torch.recipes.config import Stage
from supra_torch.uptrain.step.batches import Batch
from supra_torch.uptrain.step.stages import gradients, optimiser_for
from supra_torch.uptrain.step.step import trained_parameters
from tests.tiny_models import SPECS, lazy_weights

SPEC = {
    "tied": replace(SPECS["windowed_sink"], tie_word_embeddings=True),
    "hybrid": SPECS["hybrid"],
    "experts": SPECS["experts"],
}
ROWS = torch.randint(50, (4, 40), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Case:
    """What a step combines; ``rows`` at a time, ``checkpointing`` of every so-manieth layer."""

    model: str
    kind: Any
    stage: Mapping[str, Any] = field(default_factory=dict)
    checkpointing: int = 0
    segment: int = 0
    rows: int = 1
    precision: str = "float32"


CASES = (
    Case("tied", "distill", {"freeze": ("embeddings", "norms")}),
    Case("tied", "uptrain", {"freeze": ("embeddings",)}, checkpointing=1, segment=16),
    Case("tied", "distill", {"lora_rank": 3}, checkpointing=1, segment=16),
    Case("hybrid", "transfer", {"lora_rank": 3}, segment=16),
    Case("hybrid", "distill", checkpointing=2, segment=16),
    Case("experts", "distill", checkpointing=1, segment=16),
    Case("tied", "distill", checkpointing=1, rows=2, precision="bf16"),
    Case("tied", "transfer", segment=16, rows=2, precision="bf16"),
)


def of(case: Case, every: Processes) -> dict[str, Tensor]:
    """The whole gradient of every trained parameter after this process's share of the rows."""
    spec = SPEC[case.model]
    stage = Stage(
        kind=case.kind, share=1.0, learning_rate=1e-3, new_learning_rate=1e-2, **case.stage
    )
    student = load_model(
        spec, lazy_weights(spec), every, dtype=torch.float32, adapters=_adapters(case, stage)
    ).train()
    student.activation_checkpointing = case.checkpointing
    original = spec.with_mixers([SoftmaxAttention()] * spec.num_hidden_layers)
    teacher = load_model(
        original, lazy_weights(original, 1), every, dtype=product_type(case.precision)
    )
    teacher.eval().requires_grad_(False)
    optimiser = optimiser_for(student, stage)
    names = {parameter: name for name, parameter in student.named_parameters()}
    own = ROWS.chunk(every.size)[every.rank]
    parts = own.split(case.rows)
    for number, part in enumerate(parts, start=1):
        synchronise(student, number == len(parts))
        sharded = every.mesh is not None
        with autocast(torch.device("cpu"), case.precision, sharded=sharded):
            share = len(part) / len(own)
            gradients(case.kind, student, teacher, Batch(part), share, case.segment)
    return {
        names[parameter]: _whole(parameter.grad)
        for parameter in trained_parameters(optimiser)
        if parameter.grad is not None
    }


def _adapters(case: Case, stage: Stage) -> lora.Adapters | None:
    """Adapters that change something: as they begin, half of them have no gradient."""
    if stage.lora_rank is None:
        return None
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: LazyTensor.of((0.1 * torch.randn(tensor.shape, generator=generator)).numpy())
        for name, tensor in lora.begun(SPEC[case.model], stage.lora_rank, 0).items()
    }
    return lora.Adapters(stage.lora_rank, stage.lora_alpha, tensors)


def _whole(gradient: Any) -> Tensor:
    whole: Tensor = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
    return whole.clone()


def main() -> None:
    rank, size, together = (int(argument) for argument in sys.argv[1:4])
    torch.set_num_threads(1)
    store = dist.FileStore(sys.argv[4], size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    every = Processes(rank, size, torch.device("cpu"), mesh_over("cpu", size, together))
    found = [of(case, every) for case in CASES]
    if rank == 0:
        torch.save(found, Path(sys.argv[5]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
