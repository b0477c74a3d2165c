"""RMSNorm (arXiv 1910.07467); on a CPU, where torch has no fused one, in half of torch's passes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from supra_torch.ops.target import kind


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D) / sqrt(mean(x^2) + eps) * weight (D,), all of one floating-point type."""
    # A compiler fuses torch's own; and in 2.11 it loses the gradients of ours (pytorch#180642).
    if kind(x) != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps)
    output: Tensor = _RMSNorm.apply(x, weight, eps)[0]
    return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.rsqrt(norm.square() / x.shape[-1] + eps)
        return (x * scale).mul_(weight), scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:2], output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_output: Tensor, _: Any) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        d_weight = (d_output * normed).flatten(0, -2).sum(0)
        d_normed = d_output * weight
        along = torch.linalg.vecdot(d_normed, normed).unsqueeze(-1) / x.shape[-1]
        return d_normed.addcmul_(normed, along, value=-1).mul_(scale), d_weight, None
