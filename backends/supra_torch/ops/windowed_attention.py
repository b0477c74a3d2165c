"""Softmax weights inside a window, linear weights before it, one sum for both.

With W the window and j <= t::

    w_tj = exp(q_t . k_j / sqrt(d))                              t - W < j  (d the width of q)
    w_tj = far_gain gamma^(t - W - j) (phi(q_t) . phi(k_j))      j <= t - W
    o_t  = sum_j w_tj v_j / (sink_t + sum_j w_tj)

sink_t is the sink where any token before the window has a weight, else 0. The far sum is
:func:`linear_attention` over keys and values that lag W tokens behind. The two are joined in one
softmax, by the logarithm of the far sum, so neither can overflow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from supra_torch.ops.linear_attention import (
    document_numbers,
    linear_attention_with_sums,
    of_sequences,
)
from supra_torch.ops.window_softmax import NEVER, window_softmax


@dataclass(frozen=True)
class WindowState:
    """The last W tokens, right-aligned, and the sum of all tokens before them.

    keys (B, W, K, d); values (B, W, K, Dv); features (B, W, K, Dk); valid (B, W) bool;
    state (B, H, Dk, Dv + 1) float32.
    """

    keys: Tensor
    values: Tensor
    features: Tensor
    valid: Tensor
    state: Tensor

    @staticmethod
    def empty(window: int, k: Tensor, v: Tensor, phi_k: Tensor, heads: int) -> WindowState:
        """The state before any token, typed and placed as the given tensors."""
        B, Dk, Dv = k.shape[0], phi_k.shape[-1], v.shape[-1]
        keys, values, features = (x.new_zeros(B, window, *x.shape[2:]) for x in (k, v, phi_k))
        return WindowState(
            keys,
            values,
            features,
            valid=torch.zeros(B, window, dtype=torch.bool, device=k.device),
            state=torch.zeros(B, heads, Dk, Dv + 1, device=k.device),
        )


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    decay: Tensor,
    log_far_gain: Tensor,
    window: int,
    *,
    log_sink: Tensor | None = None,
    initial_state: WindowState | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, WindowState]:
    """Windowed softmax attention over a linear state.

    q (B, T, H, d) and k (B, T, K, d) are what the activation receives; v (B, T, K, Dv), phi_q
    (B, T, H, Dk) and phi_k (B, T, K, Dk) >= 0; decay, log_far_gain and log_sink (H,), None
    for no sink; mask (B, T) bool. With ``cu_seqlens`` (N + 1,) integers from 0 to B T, tokens
    cu_seqlens[n] to cu_seqlens[n + 1] of all rows, one after the other, are a sequence of their
    own, in one row; a row's state is that of its first one.
    Returns the output (B, T, H, Dv) in q's type and the state after each row's last token. Raises
    ValueError for packed sequences with a mask.
    """
    if cu_seqlens is not None and mask is not None:
        raise ValueError("packed sequences take no mask")
    B, T, H = q.shape[:3]
    before = initial_state or WindowState.empty(window, k, v, phi_k, H)
    new = mask if mask is not None else torch.ones_like(q[:, :, 0, 0], dtype=torch.bool)
    valid = torch.cat([before.valid, new], dim=1)
    k, v, phi_k = (
        torch.cat([old, x], dim=1)
        for old, x in ((before.keys, k), (before.values, v), (before.features, phi_k))
    )
    order = None
    if mask is not None:
        # Valid tokens move to the right end, so that W slots are W tokens.
        order = torch.argsort(valid.int(), dim=1, stable=True)
        valid = valid.gather(1, order)
        k, v, phi_k = (_gather(x, order) for x in (k, v, phi_k))
        q, phi_q = (_gather(_in_front(x, window), order)[:, window:] for x in (q, phi_q))
    with torch.autocast(q.device.type, enabled=False):
        phi_q, phi_k = phi_q.to(v.dtype), phi_k.to(v.dtype)
        documents = written = None
        initial = None if initial_state is None else before.state
        if cu_seqlens is not None:
            numbers = document_numbers(cu_seqlens, B * T).view(B, T)
            documents = torch.cat([numbers[:, :1].where(before.valid, -1), numbers], dim=1)
            # What lags behind a sequence's first tokens is another's.
            written = documents[:, :T] == documents[:, window:]
            valid = documents == numbers[:, -1:]
            if initial is not None:
                initial = of_sequences(initial, numbers[:, 0], len(cu_seqlens) - 1)
        elif mask is not None or initial_state is not None:
            # Without either chunks are alike, and an empty buffer's zeros write nothing.
            documents, written = valid.int() - 1, valid[:, :T]
        far, total, state = _far(phi_q, phi_k[:, :T], v[:, :T], decay, initial, written, cu_seqlens)
        if cu_seqlens is not None:
            state = state[numbers[:, -1]]
        mass = _log_mass(total, log_far_gain.float())
        if log_sink is not None:
            far, mass = _with_sink(far, mass, log_sink.float())
        output = window_softmax(q, k, v, documents, far, mass, window)
    if order is not None:
        output = _gather(_in_front(output, window), torch.argsort(order, dim=1))[:, window:]
    after = WindowState(k[:, T:], v[:, T:], phi_k[:, T:], valid=valid[:, T:], state=state)
    return output.to(q.dtype), after


def _far(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`linear_attention_with_sums`, for packed sequences in several rows too."""
    shape = q.shape[:2]
    if cu_seqlens is not None:
        q, k, v = (x.flatten(0, 1)[None] for x in (q, k, v))
        mask = None if mask is None else mask.reshape(1, -1)
    far, total, state = linear_attention_with_sums(
        q, k, v, decay, initial_state=initial, mask=mask, cu_seqlens=cu_seqlens
    )
    return far.view(*shape, *far.shape[2:]), total.view(*shape, *total.shape[2:]), state


def _in_front(x: Tensor, slots: int) -> Tensor:
    """x (B, T, heads, D) with zero slots before the first token."""
    return F.pad(x, (0, 0, 0, 0, slots, 0))


def _gather(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None, None].expand(-1, -1, *x.shape[2:]))


def _log_mass(total: Tensor, log_far_gain: Tensor) -> Tensor:
    """The far weights' logarithmic mass, (B, T, H) float32; ``total`` is their sum."""
    empty = total <= 0
    mass = torch.log(total.masked_fill(empty, 1.0)) + log_far_gain
    return mass.masked_fill(empty, NEVER)


def _with_sink(far: Tensor, mass: Tensor, log_sink: Tensor) -> tuple[Tensor, Tensor]:
    """The far part (B, T, H, Dv) and its mass when a token without a value belongs to it."""
    # Where nothing has left the window there is no sink either.
    both = torch.logaddexp(mass, log_sink).where(mass > NEVER, mass)
    return (far * torch.exp(mass - both)[..., None]).to(far.dtype), both
