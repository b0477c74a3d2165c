"""Long rows in segments: the memory of one segment's backward, whatever the length.

A state of fixed size is all that a segment leaves to the next. So one forward without a graph
notes the state at every border; then, from the last segment to the first, each is computed again
from its state, now with a graph, and passes the gradient of its state on to the one before. The
gradients are those of the whole row, but for rounding; the cost is one more forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from supra_torch.model.mixers.base import LayerState

States = Sequence[LayerState]
"""What is passed on from segment to segment: a mixer's state each."""


class Run(Protocol):
    """Computes the tokens of ``part`` (a slice of the T axis), going on from ``before``."""

    def __call__(self, part: slice, before: States | None) -> tuple[Tensor, States]: ...


def parts(tokens: int, segment: int) -> list[slice]:
    """Rows of so many tokens cut into segments of ``segment`` (0: one of all of them)."""
    step = segment or tokens
    return [slice(first, min(first + step, tokens)) for first in range(0, tokens, step)]


def backward(run: Run, loss: Callable[[Tensor, slice], Tensor], pieces: Sequence[slice]) -> Tensor:
    """Accumulate the gradients of the sum over ``pieces`` of ``loss(run(piece), piece)``.

    ``run`` begins without a state at the first piece. Returns the sum.
    """
    begins: list[States | None] = [None]
    with torch.no_grad():
        for part in pieces[:-1]:
            # Copies: a view would keep the whole segment that it is the end of.
            left = run(part, begins[-1])[1]
            begins.append([{name: x.clone() for name, x in state.items()} for state in left])
    total: Tensor | None = None
    gradients: list[Tensor | None] = []
    for part in reversed(pieces):
        # Weights that were rounded without a graph are not to be found by a product with one.
        torch.clear_autocast_cache()
        before = _leaves(begins.pop())
        output, after = run(part, before)
        value = loss(output, part)
        _backward(value, after, gradients)
        gradients = [leaf.grad for leaf in _numbers(before)]
        total = value.detach() if total is None else total + value.detach()
    assert total is not None
    return total


def _backward(value: Tensor, after: States, gradients: Sequence[Tensor | None]) -> None:
    """Backward from the loss, and from the state where a later segment's gradient has come."""
    reached = [
        (tensor, gradient)
        for tensor, gradient in zip(_numbers(after), gradients, strict=bool(gradients))
        if gradient is not None and tensor.requires_grad
    ]
    torch.autograd.backward(
        [value, *(tensor for tensor, _ in reached)], [None, *(gradient for _, gradient in reached)]
    )


def _leaves(states: States | None) -> States | None:
    """The same numbers, where gradients are to be found after backward."""
    if states is None:
        return None
    return [
        {
            name: x.detach().requires_grad_() if x.is_floating_point() else x
            for name, x in state.items()
        }
        for state in states
    ]


def _numbers(states: States | None) -> Iterator[Tensor]:
    """What of the states can have a gradient, in a fixed order."""
    for state in states or ():
        yield from (x for x in state.values() if x.is_floating_point())
