"""Rotation of channel pairs by their angles (RoPE, arXiv 2104.09864), with few temporaries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    """x (B, T, heads, channels) rotated in float32, returned in its own type.

    cos and sin (B or 1, T, 1, channels / 2) float32; ``half`` pairs channel i with
    i + channels / 2, else 2 i with 2 i + 1. Gradients reach x only.
    """
    turned: Tensor = _Rotate.apply(x, cos, sin, half)
    return turned


class _Rotate(torch.autograd.Function):
    """Backward is the rotation back, which needs the angles alone: x is not kept."""

    @staticmethod
    def forward(x: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
        return _turned(x, cos, sin, half)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cos, sin, ctx.half = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, -sin, ctx.half), None, None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, half: bool) -> Tensor:
    exact = x.float()
    first, second = exact.chunk(2, -1) if half else exact.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (
        torch.addcmul(first * cos, second, sin, value=-1),
        torch.addcmul(second * cos, first, sin),
    )
    out = torch.cat(turned, -1) if half else torch.stack(turned, -1).flatten(-2)
    # No alias of what is returned: torch.compile 2.11 loses its gradients (pytorch#180642).
    return out if out.dtype == x.dtype else out.to(x.dtype)
