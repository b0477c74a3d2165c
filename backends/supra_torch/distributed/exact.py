"""Sums of gradients in float64, rounded once: they depend on no order or number of processes.

Each row's gradients are computed alone, so they are the same on every process. Sums in another
order differ by about 1e-16 of their size, and round to another float32 once in about 1e8 times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supra_torch.distributed.processes import Processes


class Float64Sums:
    """The gradients of parameters over the rows of a step, in a single process.

    With several processes, FSDP sums over rows and processes in its ``reduce_dtype``.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: dict[nn.Parameter, Tensor] = {}

    def add(self) -> None:
        """Add and clear the gradients that a row's backward left on the parameters."""
        for parameter in self._parameters:
            if parameter.grad is None:
                continue
            if parameter in self._sums:
                self._sums[parameter] += parameter.grad
            else:
                self._sums[parameter] = parameter.grad.double()
            parameter.grad = None

    def put_back(self) -> None:
        """Put the sums on the parameters, in their own type."""
        for parameter in list(self._sums):
            parameter.grad = self._sums.pop(parameter).to(parameter.dtype)

    def tensors(self) -> Iterable[Tensor]:
        """The sums, to measure their memory."""
        return self._sums.values()


def clip_gradients(parameters: Sequence[nn.Parameter], most: float, processes: Processes) -> float:
    """Scale the gradients so that their norm over all processes is at most ``most``.

    Returns their norm before: summed in float64 over all shards, and rounded once.
    """
    shards = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    squares = [torch.linalg.vector_norm(shard, dtype=torch.float64).square() for shard in shards]
    own = torch.stack(squares).sum().item() if squares else 0.0
    copies = 1 if processes.mesh is None else processes.mesh.size(0)
    total = torch.tensor(processes.sums([own])[0] / copies, dtype=torch.float64).sqrt().float()
    norm = total.item()
    if math.isfinite(norm) and norm > most:
        for shard in shards:
            shard.mul_(most / norm)
    return norm


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
