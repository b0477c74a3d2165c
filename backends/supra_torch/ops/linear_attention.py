"""Causal linear attention with decay: one operator, three implementations, one dispatcher.

For one head with decay gamma, n_t the number of valid tokens up to t::

    o_t = sum_{j <= t} gamma^(n_t - n_j) (q_t . k_j) v_j  +  gamma^(n_t) q_t S_0

``reference`` is the dense form, for checks; ``chunked`` is torch, for CPUs; ``triton`` is the
fused kernel, for GPUs. All three obey one contract, :class:`Operator`.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from supra_torch.ops.chunked import linear_attention_chunked
from supra_torch.ops.dense import linear_attention_dense, with_sink
from supra_torch.ops.kernels import scan_kernel
from supra_torch.ops.target import kind

Implementation = Literal["auto", "reference", "chunked", "triton"]


class Operator(Protocol):
    """What an implementation is: shapes as in :func:`linear_attention`, already checked.

    ``slope`` (H,) float32 is -ln gamma >= 0. Returns the output in q's type, the float32 sum of
    the weights (B, T, H) by which it was divided (without ``normalise`` an empty tensor), and
    the final state. All three carry gradients to q, k, v, slope and initial_state.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slope: Tensor,
        initial_state: Tensor | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        normalise: bool,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normaliser: Literal["sum"] | None = None,
    sink: Tensor | None = None,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Causal linear attention with decay.

    q (B, T, H, Dk); k (B, T, K, Dk) and v (B, T, K, Dv), query head h using key/value head
    h // (H / K); decay (H,), gamma in (0, 1] (float64 keeps slow heads exact); initial_state
    (B, H, Dk, Dv) float32, zeros when None; mask (B, T) bool, False tokens neither write nor
    decay. With ``cu_seqlens`` (N + 1,) integers from 0 to T, B is 1 and tokens cu_seqlens[n] to
    cu_seqlens[n + 1] are a sequence of their own with its own state, (N, H, Dk, Dv). With
    ``normaliser="sum"`` the output is divided by q_t . z_t plus ``sink`` (H,) >= 0 if there is
    one, and the state has z as a last column: (B, H, Dk, Dv + 1).

    Returns the output (B, T, H, Dv) in q's type and the final state, float32. Products are taken
    in the type of q; sums, decay and state are float32. ``auto`` takes the Triton kernel for
    CUDA tensors that it supports, else the chunked form. Raises ValueError when the shapes do
    not fit together, or the implementation asked for does not support them.
    """
    if sink is not None and normaliser != "sum":
        raise ValueError("a sink is added to the sum: it needs normaliser='sum'")
    output, sums, state = linear_attention_with_sums(
        q, k, v, decay, initial_state=initial_state, mask=mask, cu_seqlens=cu_seqlens,
        normalise=normaliser == "sum", implementation=implementation,
    )  # fmt: skip
    return (output if sink is None else with_sink(output, sums, sink)), state


def linear_attention_with_sums(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    *,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    normalise: bool = True,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`linear_attention` with what it divided by: output, sums (B, T, H) float32, state."""
    check_shapes(q, k, v, decay, initial_state, mask, cu_seqlens, normalise)
    operator = _implementation(implementation, q, k, v)
    # The logarithm in decay's own type: near gamma = 1 float32 has few digits left.
    slope = -torch.log(decay).float().to(q.device)
    # Autocast would turn the float32 sums into bfloat16.
    with torch.autocast(q.device.type, enabled=False):
        return operator(
            q, k.to(q.dtype), v.to(q.dtype), slope, initial_state, mask, cu_seqlens, normalise
        )


def document_numbers(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Which of the packed sequences each of so many tokens belongs to, (tokens,) int64."""
    places = torch.arange(tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].long(), places, right=True)


def of_sequences(rows: Tensor, numbers: Tensor, sequences: int) -> Tensor:
    """States (B, ...) as those of the packed sequences ``numbers`` (B,); the others' are zeros."""
    return rows.new_zeros(sequences, *rows.shape[1:]).index_copy(0, numbers, rows)


def _implementation(name: Implementation, q: Tensor, k: Tensor, v: Tensor) -> Operator:
    if name == "reference":
        return linear_attention_dense
    if name == "chunked" or (name == "auto" and kind(q) != "cuda"):
        return linear_attention_chunked
    if name not in ("auto", "triton"):
        raise ValueError(f"unknown implementation '{name}': use auto, reference, chunked or triton")
    kernel = scan_kernel(q, k, v)
    if not isinstance(kernel, str):
        return kernel
    if name == "auto":
        return linear_attention_chunked
    raise ValueError(f"{kernel}: use implementation='chunked'")


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalise: bool,
) -> None:
    """Raise ValueError unless the shapes fit together; values on the device are not looked at."""
    B, T, H, Dk = q.shape
    K, Dv = v.shape[2:]
    if tuple(k.shape) != (B, T, K, Dk) or tuple(v.shape[:2]) != (B, T) or H % K or T < 1:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together"
        )
    if tuple(decay.shape) != (H,):
        raise ValueError(f"decay must have shape ({H},), not {tuple(decay.shape)}")
    if mask is not None and tuple(mask.shape) != (B, T):
        raise ValueError(f"mask must have shape ({B}, {T}), not {tuple(mask.shape)}")
    sequences = B
    if cu_seqlens is not None:
        if B != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.is_floating_point():
            raise ValueError(
                "cu_seqlens must be a vector of at least two integers, and the batch one row, not "
                f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype} and {B} rows"
            )
        sequences = len(cu_seqlens) - 1
    expected = (sequences, H, Dk, Dv + normalise)
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise ValueError(
            f"initial_state must have shape {expected}, not {tuple(initial_state.shape)}"
        )
