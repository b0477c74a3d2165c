"""Gradients of rows that processes share: what test_context starts.

python -m tests.torch.context_gradients RANK PROCESSES few|all STORE OUT
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from supra_torch.distributed.processes import part_of_rows
from supra_torch.model.context_parallel import Part
from supra_torch.model.mixers import softmax
from supra_torch.model.model import SupraModel, build
from supra_torch.uptrain.step.batches import Batch
from supra_torch.uptrain.step.stages import gradients, next_token_loss
from tests.tiny_models import SPECS, lazy_weights

ROWS = torch.randint(50, (2, 60), generator=torch.Generator().manual_seed(0))
# Parts that begin with a document, inside one, and inside one that goes through several; a document
# of a single token; the last two are empty, as in a run.
BORDERS = torch.tensor([0, 7, 20, 43, 44, 60, 75, 118, 120, 120, 120], dtype=torch.int32)


class Case(NamedTuple):
    model: str
    kind: Any
    packed: bool
    checkpointing: bool = False
    compiled: bool = False


CASES = (
    *(Case(*case) for case in itertools.product(SPECS, ("uptrain",), (False, True))),
    *(
        Case(*case)
        for case in itertools.product(
            ("windowed_sink", "hybrid", "sandwich"), ("transfer", "distill"), (False, True)
        )
    ),
    Case("windowed_sink", "distill", True, checkpointing=True),
    Case("hybrid", "uptrain", False, checkpointing=True),
    Case("windowed_sink", "uptrain", True, compiled=True),
    Case("hybrid", "uptrain", False, compiled=True),
)


FEW = (
    Case("hybrid", "uptrain", False),
    Case("sandwich", "uptrain", True),
    Case("paper_variant", "uptrain", True),
    Case("windowed_sink", "transfer", True),
    Case("windowed_sink", "distill", True, checkpointing=True),
)


def cases(count: int, which: str) -> tuple[Case, ...]:
    """Few, or all for three processes, and for four what has softmax: its heads divide unevenly."""
    if which == "few":
        return FEW
    if count == 3:
        return CASES
    return tuple(case for case in CASES if case.model in ("transformer", "sliding", "hybrid"))


def of(case: Case, part: Part | None) -> dict[str, Tensor]:
    """What this process computes of loss, evaluation and gradients."""
    model, teacher = _model(case.model), _model(case.model, 0.1).requires_grad_(False)
    model.activation_checkpointing = case.checkpointing
    batch = Batch(ROWS, BORDERS if case.packed else None, part)
    with torch.no_grad():
        evaluated = next_token_loss(model, batch)
    if case.compiled:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
    loss = gradients(case.kind, model, teacher, batch, 0.5)
    found = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": loss, "evaluated": evaluated, **found}


def _model(name: str, noise: float = 0.0) -> SupraModel:
    model = build(SPECS[name], lazy_weights(SPECS[name]), dtype=torch.float64).double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter += noise * torch.randn(parameter.shape, generator=generator)
    return model


def main() -> None:
    rank, size = int(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    # As in rows that are longer.
    softmax._QUERIES = 17
    store = dist.FileStore(sys.argv[4], size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    found = []
    part = part_of_rows(rank, size)
    for case in cases(size, sys.argv[3]):
        sums = of(case, part)
        for tensor in sums.values():
            dist.all_reduce(tensor)
        found.append(sums)
    if rank == 0:
        torch.save(found, Path(sys.argv[5]))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
