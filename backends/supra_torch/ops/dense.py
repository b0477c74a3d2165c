"""The dense form of causal linear attention: all T x T weights at once, for checks.

Its memory grows with T squared. Plain differentiable torch, in float32, or float64 for float64
inputs, so that autograd gives gradients to compare with.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_attention_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :class:`~supra_torch.ops.linear_attention.Operator` says."""
    if cu_seqlens is not None:
        return _packed(q, k, v, slope, initial_state, mask, cu_seqlens, normalise)
    B, T, H, Dk = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    wide = append_ones(v) if normalise else v
    q_, k_, v_ = (x.to(dtype).transpose(1, 2) for x in (q, k, wide))
    k_, v_ = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k_, v_))
    rate = slope.to(dtype)[:, None]
    valid = torch.ones(B, T, dtype=torch.bool, device=q.device) if mask is None else mask
    age = valid.cumsum(1)[:, None].to(dtype)  # (B, 1, T)
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril() & valid[:, None, None]
    exponent = (age[..., :, None] - age[..., None, :]).clamp(min=0)
    weights = torch.exp(-rate[..., None] * exponent) * causal
    output = (q_ @ k_.mT * weights) @ v_
    left = torch.exp(-rate * (age[..., -1:] - age)) * valid[:, None]  # (B, H, T)
    state = (k_ * left[..., None]).mT @ v_
    if initial_state is not None:
        initial_state = initial_state.to(dtype)
        output = output + torch.exp(-rate * age)[..., None] * (q_ @ initial_state)
        state = state + torch.exp(-rate * age[..., -1:])[..., None] * initial_state
    output = output.transpose(1, 2)
    sums = output.new_empty(0)
    if normalise:
        output, sums = output[..., :-1], output[..., -1]
        output = safe_divide(output, sums[..., None])
    return output.to(q.dtype), sums, state


def append_ones(v: Tensor) -> Tensor:
    """v (..., Dv) -> (..., Dv + 1): the column that sums the weights."""
    return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)


def safe_divide(output: Tensor, total: Tensor) -> Tensor:
    """output / total, 0 where nothing was written and total is 0."""
    empty = total == 0
    return torch.where(empty, 0.0, output / torch.where(empty, 1.0, total))


def with_sink(output: Tensor, total: Tensor, sink: Tensor) -> Tensor:
    """output (..., H, Dv), divided by total (..., H), as if sink (H,) had been added to it."""
    return (output * safe_divide(total, total + sink)[..., None]).to(output.dtype)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sequence by sequence; an empty one leaves its state as it was."""
    H, Dk, Dv = q.shape[2], q.shape[3], v.shape[3] + normalise
    borders = cu_seqlens.tolist()
    parts = []
    for n, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        before = None if initial_state is None else initial_state[n : n + 1]
        if start == end:
            dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
            kept = q.new_zeros(1, H, Dk, Dv, dtype=dtype) if before is None else before
            parts.append((q[:, :0, :, :1].expand(1, 0, H, v.shape[3]), q.new_empty(1, 0, H), kept))
            continue
        rows = slice(start, end)
        part = None if mask is None else mask[:, rows]
        parts.append(
            linear_attention_dense(
                q[:, rows], k[:, rows], v[:, rows], slope, before, part, None, normalise
            )
        )
    outputs, sums, states = zip(*parts, strict=True)
    total = torch.cat(sums, dim=1) if normalise else outputs[0].new_empty(0)
    return torch.cat(outputs, dim=1), total, torch.cat(states)
