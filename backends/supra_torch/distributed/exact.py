"""Sums of gradients in float64, rounded once: no number of processes, and no order, shows in them.

Every row's gradients are computed by themselves, so they are the same wherever that is. Sums of
them in another order differ by some 1e-16 of their size, and round to the same float32 but once in
some 1e8 times.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supra_torch.distributed.processes import Processes


class Float64Sums:
    """The gradients of parameters over the rows of a step, in a process without others.

    Where there are others, FSDP sums over rows and processes in its ``reduce_dtype``.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self._sums: dict[nn.Parameter, Tensor] = {}

    def add(self) -> None:
        """Take what a row's backward left on the parameters."""
        for parameter in self._parameters:
            if parameter.grad is None:
                continue
            if parameter in self._sums:
                self._sums[parameter] += parameter.grad
            else:
                self._sums[parameter] = parameter.grad.double()
            parameter.grad = None

    def leave(self) -> None:
        """Put the sums back, in the parameters' own type."""
        for parameter in list(self._sums):
            parameter.grad = self._sums.pop(parameter).to(parameter.dtype)

    def tensors(self) -> Iterable[Tensor]:
        """The sums, for who asks what memory they take."""
        return self._sums.values()


def clip_gradients(parameters: Sequence[nn.Parameter], most: float, processes: Processes) -> float:
    """Scale the gradients so that their norm over all processes is at most ``most``.

    Returns the norm that they had: summed in float64 over whatever shards, and rounded once.
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


def local(gradient: Tensor) -> Tensor:
    """What this process holds of a gradient."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
