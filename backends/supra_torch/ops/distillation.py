"""KL divergence to a teacher's distribution, without holding the logits of all tokens.

For each chunk of tokens the gradient (softmax(student) - softmax(teacher)) is turned into the
gradients of the hidden states and the head at once, as in Liger-Kernel's fused losses; so peak
memory is a chunk's logits, and nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def linear_kl_divergence(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, chunk: int = 512
) -> Tensor:
    """Mean over tokens of KL(teacher || student), in nats.

    hidden (tokens, D) and weight (V, D) are the student's, the others the teacher's; products
    are taken in the type of ``hidden``, everything else is float32. Gradients reach ``hidden``
    and ``weight`` only.
    """
    loss: Tensor = _LinearKLDivergence.apply(hidden, weight, teacher_hidden, teacher_weight, chunk)
    return loss


class _LinearKLDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        chunk: int,
    ) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            dtype, tokens = hidden.dtype, hidden.shape[0]
            w, teacher_w = weight.to(dtype), teacher_weight.to(dtype)
            needs_hidden, needs_weight = ctx.needs_input_grad[:2]
            grad_hidden = torch.empty_like(hidden) if needs_hidden else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
            total = torch.zeros((), dtype=torch.float64, device=hidden.device)
            for start in range(0, tokens, chunk):
                rows = slice(start, start + chunk)
                student = torch.log_softmax((hidden[rows] @ w.T).float(), dim=-1)
                teacher = torch.log_softmax(
                    (teacher_hidden[rows].to(dtype) @ teacher_w.T).float(), dim=-1
                )
                probability = teacher.exp()
                total += (probability * teacher.sub_(student)).sum(dtype=torch.float64)
                if grad_hidden is None and grad_weight is None:
                    continue
                difference = student.exp_().sub_(probability).div_(tokens).to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = difference @ w
                if grad_weight is not None:
                    grad_weight += (difference.T @ hidden[rows]).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        return (total / tokens).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        if grad_hidden is not None:
            grad_hidden = grad_hidden * scale
        if grad_weight is not None:
            grad_weight = grad_weight * scale
        return grad_hidden, grad_weight, None, None, None
