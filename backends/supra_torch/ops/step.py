"""One decode step of linear attention: the recurrent form, the state updated once a token.

For one head with decay gamma::

    S_t = gamma S_{t-1} + k_t^T v_t        o_t = q_t S_t

With the normaliser v has a column of ones, so that the state's last column is z and o_t is
divided by q_t . z_t. ``torch`` is plain differentiable torch; ``triton`` is one kernel, behind
custom operators that torch.compile and CUDA graphs take as they are.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, Protocol

import torch
from torch import Tensor

from supra_torch.ops.dense import append_ones, safe_divide, with_sink

StepImplementation = Literal["auto", "torch", "triton"]

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads it when a kernel is defined; then CPU tensors are what it takes.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TRITON_TYPES = (torch.float32, torch.float16, torch.bfloat16)


class Step(Protocol):
    """:func:`linear_attention_step`, or the form of it that updates the state in place."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slope: Tensor,
        state: Tensor,
        normalise: bool,
        *,
        mask: Tensor | None = None,
        sink: Tensor | None = None,
        implementation: StepImplementation = "auto",
    ) -> tuple[Tensor, Tensor]: ...


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    state: Tensor,
    normalise: bool,
    *,
    mask: Tensor | None = None,
    sink: Tensor | None = None,
    implementation: StepImplementation = "auto",
) -> tuple[Tensor, Tensor]:
    """One token for each of B sequences: the output (B, H, Dv) in q's type, and the new state.

    q (B, H, Dk); k (B, K, Dk) and v (B, K, Dv), query head h using key/value head h // (H / K);
    slope (H,) float32 is -ln gamma >= 0; state (B, H, Dk, Dv) float32, with ``normalise`` its
    last column, Dv + 1, is z; mask (B,) bool, False leaves a sequence's state as it was. Sums,
    decay and state are float32. An output whose q . z is 0 is 0. ``sink`` (H,) float32 >= 0 is
    added to q . z before it divides.

    ``auto`` takes the Triton kernel for CUDA tensors without gradients, else torch. Raises
    ValueError when the shapes do not fit together, or Triton cannot run here.
    """
    output, sums, after = linear_attention_step_with_sums(
        q, k, v, slope, state, normalise, mask=mask, implementation=implementation
    )
    return (output if sink is None else with_sink(output, sums, sink)), after


def linear_attention_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    state: Tensor,
    normalise: bool,
    *,
    mask: Tensor | None = None,
    sink: Tensor | None = None,
    implementation: StepImplementation = "auto",
) -> tuple[Tensor, Tensor]:
    """:func:`linear_attention_step` that overwrites ``state``, which it also returns."""
    if _chosen(implementation, q, k, v, slope, state, normalise, mask) == "triton":
        output, sums = _triton_step_(q, k, v, slope, state, mask, normalise)
    else:
        state.addcmul_(state, _decay_change(slope, mask))
        output, sums = _write_and_read(q, k, v, state, mask, normalise)
    return (output if sink is None else with_sink(output, sums, sink)), state


def linear_attention_step_with_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    state: Tensor,
    normalise: bool,
    *,
    mask: Tensor | None = None,
    implementation: StepImplementation = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`linear_attention_step` with what it divided by: output, sums (B, H), state."""
    if _chosen(implementation, q, k, v, slope, state, normalise, mask) == "triton":
        return _triton_step(q, k, v, slope, state, mask, normalise)
    after = torch.addcmul(state, state, _decay_change(slope, mask))
    output, sums = _write_and_read(q, k, v, after, mask, normalise)
    return output, sums, after


def _decay_change(slope: Tensor, mask: Tensor | None) -> Tensor:
    """gamma - 1, (1, H, 1, 1) or (B, H, 1, 1); as gamma itself, float32 would round it away."""
    change = torch.expm1(-slope)[None, :, None, None]
    return change if mask is None else change * mask[:, None, None, None]


def _write_and_read(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, mask: Tensor | None, normalise: bool
) -> tuple[Tensor, Tensor]:
    """Add k^T v to the decayed state, in place; output and sums (B, H)."""
    B, H, Dk = q.shape
    K = k.shape[1]
    key = k.to(state.dtype) if mask is None else k.to(state.dtype) * mask[:, None, None]
    value = (append_ones(v) if normalise else v).to(state.dtype)
    grouped = state.view(B, K, H // K, Dk, -1)
    grouped.addcmul_(key[:, :, None, :, None], value[:, :, None, None, :])
    output = (q.to(state.dtype)[:, :, None] @ state)[:, :, 0]
    if not normalise:
        return output.to(q.dtype), state.new_empty(0)
    output, sums = output[..., :-1], output[..., -1]
    return safe_divide(output, sums[..., None]).to(q.dtype), sums


def _chosen(
    implementation: StepImplementation,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    state: Tensor,
    normalise: bool,
    mask: Tensor | None,
) -> Literal["torch", "triton"]:
    """The implementation to run; ValueError unless it and the shapes fit."""
    _check_shapes(q, k, v, slope, state, normalise, mask)
    if implementation == "auto":
        learning = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, slope, state))
        fits = not learning and state.is_cuda and _why_not_triton(q, k, v, slope, state) is None
        return "triton" if fits else "torch"
    if implementation == "triton":
        reason = _why_not_triton(q, k, v, slope, state)
        if reason is not None:
            raise ValueError(f"the Triton decode step cannot run: {reason}")
        return "triton"
    if implementation == "torch":
        return "torch"
    raise ValueError(f"unknown implementation '{implementation}': use auto, torch or triton")


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    state: Tensor,
    normalise: bool,
    mask: Tensor | None,
) -> None:
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


def _why_not_triton(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, state: Tensor) -> str | None:
    """What keeps the kernel from running on these tensors, if anything does."""
    if not _TRITON_INSTALLED:
        return "triton is not installed"
    if not state.is_cuda and not _INTERPRETED:
        return f"the tensors are on {state.device.type}, not on a CUDA device"
    if any(x.dtype not in _TRITON_TYPES for x in (q, k, v)):
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not of 16 or 32 bits"
    if state.dtype != torch.float32 or slope.dtype != torch.float32:
        return f"state and slope are {state.dtype} and {slope.dtype}, not float32"
    if not state.is_contiguous():
        return "the state is not contiguous"
    return None


@torch.library.custom_op("supra::linear_attention_step", mutates_args=())
def _triton_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    state: Tensor,
    mask: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, sums and new state by the Triton kernel."""
    from supra_torch.ops.triton_step import launch

    after = torch.empty_like(state)
    output, sums = launch(q, k, v, slope, state, mask, normalise, after)
    return output, sums, after


@_triton_step.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    state: Tensor,
    mask: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (*_empty_results(q, v, state, normalise), torch.empty_like(state))


@torch.library.custom_op("supra::linear_attention_step_", mutates_args={"state"})
def _triton_step_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    state: Tensor,
    mask: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    """Output and sums by the Triton kernel, which overwrites the state."""
    from supra_torch.ops.triton_step import launch

    return launch(q, k, v, slope, state, mask, normalise, state)


@_triton_step_.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    state: Tensor,
    mask: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor]:
    return _empty_results(q, v, state, normalise)


def _empty_results(q: Tensor, v: Tensor, state: Tensor, normalise: bool) -> tuple[Tensor, Tensor]:
    B, H, _ = q.shape
    return q.new_empty(B, H, v.shape[2]), state.new_empty((B, H) if normalise else (0,))
