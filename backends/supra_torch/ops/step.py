"""One decode step of linear attention: the recurrent form, the state updated once a token.

For one head with decay gamma::

    S_t = gamma S_{t-1} + k_t^T v_t        o_t = q_t S_t

With the normaliser v has a column of ones, so that the state's last column is z and o_t is
divided by q_t . z_t. ``torch`` is plain differentiable torch; ``triton`` is one kernel.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from supra_torch.ops.dense import append_ones, safe_divide, with_sink
from supra_torch.ops.kernels import step_kernel, step_kernel_, why_no_step_kernel

StepImplementation = Literal["auto", "torch", "triton"]


class StepInputs(NamedTuple):
    """One token for each of B sequences.

    q (B, H, Dk); k (B, K, Dk) and v (B, K, Dv), query head h using key/value head h // (H / K);
    slope (H,) float32 is -ln gamma >= 0; state (B, H, Dk, Dv) float32, with ``normalise`` its
    last column, Dv + 1, is z; mask (B,) bool, False leaves a sequence's state as it was.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    slope: Tensor
    state: Tensor
    normalise: bool
    mask: Tensor | None = None


def linear_attention_step(
    x: StepInputs, *, sink: Tensor | None = None, implementation: StepImplementation = "auto"
) -> tuple[Tensor, Tensor]:
    """The output (B, H, Dv) in q's type, and the new state; sums, decay and state are float32.

    An output whose q . z is 0 is 0. ``sink`` (H,) float32 >= 0 is added to q . z before it
    divides. ``auto`` takes the Triton kernel for CUDA tensors without gradients, else torch.
    Raises ValueError when the shapes do not fit together, or Triton cannot run here.
    """
    output, sums, after = linear_attention_step_with_sums(x, implementation=implementation)
    return (output if sink is None else with_sink(output, sums, sink)), after


def linear_attention_step_(
    x: StepInputs, *, sink: Tensor | None = None, implementation: StepImplementation = "auto"
) -> tuple[Tensor, Tensor]:
    """:func:`linear_attention_step` that overwrites the state, which it also returns."""
    if _uses_kernel(x, implementation):
        output, sums = step_kernel_(*x)
    else:
        x.state.addcmul_(x.state, _decay_change(x))
        output, sums = _write_and_read(x, x.state)
    return (output if sink is None else with_sink(output, sums, sink)), x.state


def linear_attention_step_with_sums(
    x: StepInputs, *, implementation: StepImplementation = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`linear_attention_step` with what it divided by: output, sums (B, H), state."""
    if _uses_kernel(x, implementation):
        return step_kernel(*x)
    after = torch.addcmul(x.state, x.state, _decay_change(x))
    output, sums = _write_and_read(x, after)
    return output, sums, after


def _decay_change(x: StepInputs) -> Tensor:
    """gamma - 1, (1, H, 1, 1) or (B, H, 1, 1); as gamma itself, float32 would round it away."""
    change = torch.expm1(-x.slope)[None, :, None, None]
    return change if x.mask is None else change * x.mask[:, None, None, None]


def _write_and_read(x: StepInputs, state: Tensor) -> tuple[Tensor, Tensor]:
    """Add k^T v to the decayed state, in place; output and sums (B, H)."""
    B, H, Dk = x.q.shape
    K = x.k.shape[1]
    key = x.k.to(state.dtype)
    if x.mask is not None:
        key = key * x.mask[:, None, None]
    value = (append_ones(x.v) if x.normalise else x.v).to(state.dtype)
    grouped = state.view(B, K, H // K, Dk, -1)
    grouped.addcmul_(key[:, :, None, :, None], value[:, :, None, None, :])
    output = (x.q.to(state.dtype)[:, :, None] @ state)[:, :, 0]
    if not x.normalise:
        return output.to(x.q.dtype), state.new_empty(0)
    output, sums = output[..., :-1], output[..., -1]
    return safe_divide(output, sums[..., None]).to(x.q.dtype), sums


def _uses_kernel(x: StepInputs, implementation: StepImplementation) -> bool:
    """Whether Triton's kernel runs, else torch; ValueError unless that and the shapes fit."""
    _check_shapes(x)
    if implementation == "auto":
        learning = torch.is_grad_enabled() and any(z.requires_grad for z in x[:5])
        return not learning and x.state.is_cuda and why_no_step_kernel(*x[:5]) is None
    if implementation == "triton":
        reason = why_no_step_kernel(*x[:5])
        if reason is not None:
            raise ValueError(f"the Triton decode step cannot run: {reason}")
        return True
    if implementation == "torch":
        return False
    raise ValueError(f"unknown implementation '{implementation}': use auto, torch or triton")


def _check_shapes(x: StepInputs) -> None:
    q, k, v, slope, state, normalise, mask = x
    B, H, Dk = q.shape
    K, Dv = v.shape[1:]
    if tuple(k.shape) != (B, K, Dk) or v.shape[0] != B or H % K:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together"
        )
    expected = (B, H, Dk, Dv + normalise)
    if tuple(state.shape) != expected:
        raise ValueError(f"state must have shape {expected}, not {tuple(state.shape)}")
    if tuple(slope.shape) != (H,):
        raise ValueError(f"slope must have shape ({H},), not {tuple(slope.shape)}")
    if mask is not None and (tuple(mask.shape) != (B,) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be ({B},) bool, not {tuple(mask.shape)} {mask.dtype}")
