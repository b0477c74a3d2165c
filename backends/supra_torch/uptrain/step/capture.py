"""A stage's forward and backward as one CUDA graph: one launch instead of thousands.

A step of a small model launches more kernels than a host can keep up with. What the graph reads
and writes stays in its place, so every batch is copied to where the first one was, and gradients
are found where the first ones were:
https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from supra_torch.uptrain.step.batches import Batch

Gradients = Callable[[Sequence[Batch]], Tensor]
"""Parts of a batch -> the loss; leaves its gradients on the parameters."""

# Compilers and libraries set themselves up in a few steps before.
_WARMUP = 3


class CapturedGradients:
    """``compute`` as a graph, captured at the first call, for batches of the first one's shape.

    Where it cannot be captured, ``say`` is told why, and every call computes it anew.
    """

    def __init__(
        self, compute: Gradients, parameters: Sequence[nn.Parameter], say: Callable[[str], None]
    ) -> None:
        self._compute, self._parameters, self._say = compute, parameters, say
        self._captured: _Captured | None = None
        self._possible = True

    @property
    def succeeded(self) -> bool:
        """Whether a graph was captured; False before the first call."""
        return self._captured is not None

    def __call__(self, batches: Sequence[Batch]) -> Tensor:
        if self._captured is None and self._possible:
            try:
                self._captured = self._capture(batches)
            except RuntimeError as error:
                self._possible = False
                self._clear()
                self._say(f"every kernel is launched by the host, since a CUDA graph of a step "
                          f"is not possible here: {str(error).splitlines()[0]}")  # fmt: skip
        if self._captured is None:
            return self._compute(batches)
        return self._captured.replay(batches, self._parameters)

    def _capture(self, batches: Sequence[Batch]) -> _Captured:
        place = [
            batch._replace(
                ids=batch.ids.clone(),
                cu_seqlens=None if batch.cu_seqlens is None else batch.cu_seqlens.clone(),
            )
            for batch in batches
        ]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARMUP):
                self._compute(place)
                self._clear()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self._compute(place)
        return _Captured(graph, place, loss, [parameter.grad for parameter in self._parameters])

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


@dataclass(frozen=True)
class _Captured:
    """A graph, where it reads its batch, and where it writes the loss and the gradients."""

    graph: torch.cuda.CUDAGraph
    batches: list[Batch]
    loss: Tensor
    gradients: list[Tensor | None]

    def replay(self, batches: Sequence[Batch], parameters: Sequence[nn.Parameter]) -> Tensor:
        for place, batch in zip(self.batches, batches, strict=True):
            place.ids.copy_(batch.ids)
            if place.cu_seqlens is not None and batch.cu_seqlens is not None:
                place.cu_seqlens.copy_(batch.cu_seqlens)
        self.graph.replay()
        # The optimiser lets go of them after each step.
        for parameter, gradient in zip(parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss
