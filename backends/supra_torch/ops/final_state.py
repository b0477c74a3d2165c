"""The state after the last token alone, for who needs it before the outputs.

With a_t the tokens after t, all of which count::

    S  = sum_t gamma^(a_t) k_t^T v_t
    dk_t = gamma^(a_t) v_t dS^T    dv_t = gamma^(a_t) k_t dS    d ln gamma = sum_t a_t (k_t . dk_t)

Sums and products are float32, float64 for float64 inputs; so many tokens at a time that their
weighted keys are small.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from supra_torch.ops.target import kind

# Bytes of the keys that are weighted at once: on a CPU they stay in the caches, a GPU is to be
# filled by few launches.
AT_ONCE = {"cpu": 2**23, "cuda": 2**28}


def final_state(
    k: Tensor, v: Tensor, slope: Tensor, counted: Tensor | None, normalise: bool
) -> Tensor:
    """The state that :func:`linear_attention` ends with, begun from nothing.

    k (B, T, K, Dk); v (B, T, K, Dv); slope (H,) is -ln gamma >= 0; counted (B, T) bool, None for
    all: tokens that write, and behind the first of which all do. Returns (B, H, Dk, Dv) float32,
    with a last column for the sum of the keys if ``normalise``. Gradients reach k, v and slope.
    """
    with torch.autocast(k.device.type, enabled=False):
        state: Tensor = _forward_op(k, v, slope, counted, normalise)
    return state


@torch.library.custom_op("supra::final_state", mutates_args=())
def _forward_op(
    k: Tensor, v: Tensor, slope: Tensor, counted: Tensor | None, normalise: bool
) -> Tensor:
    state = _forward_fake(k, v, slope, counted, normalise).zero_()
    by_head = state.view(k.shape[0] * k.shape[2], -1, state.shape[-1])
    for piece in _pieces(k, v, slope, counted, normalise):
        by_head.baddbmm_(piece.weighted().mT, piece.v)
    return state


@_forward_op.register_fake
def _forward_fake(
    k: Tensor, v: Tensor, slope: Tensor, counted: Tensor | None, normalise: bool
) -> Tensor:
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    B, Dk, width = k.shape[0], k.shape[3], v.shape[3] + normalise
    return k.new_empty(B, len(slope), Dk, width, dtype=wide)


@torch.library.custom_op("supra::final_state_backward", mutates_args=())
def _backward_op(
    d_state: Tensor, k: Tensor, v: Tensor, slope: Tensor, counted: Tensor | None, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of k, v and slope."""
    dk, dv, d_slope = _backward_fake(d_state, k, v, slope, counted, normalise)
    B, K, Dk, Dv = k.shape[0], k.shape[2], k.shape[3], v.shape[3]
    by_head = d_state.reshape(B * K, -1, d_state.shape[3])
    total = torch.zeros_like(d_slope)
    for piece in _pieces(k, v, slope, counted, normalise):
        pairs = torch.bmm(piece.v, by_head.mT).unflatten(2, (-1, Dk))
        d_keys = pairs * piece.weight
        dk[:, piece.place] = d_keys.sum(2).unflatten(0, (B, K)).transpose(1, 2)
        aged = (d_keys * piece.k[:, :, None]).sum(-1) * piece.age[:, None]
        total -= aged.unflatten(0, (B, K)).sum((0, 2)).flatten()
        d_values = torch.bmm(piece.weighted(), by_head)[..., :Dv]
        d_values = d_values.unflatten(0, (B, K)).transpose(1, 2)
        if counted is not None:
            d_values = d_values * counted[:, piece.place, None, None]
        dv[:, piece.place] = d_values
    d_slope.copy_(total)
    return dk, dv, d_slope


@_backward_op.register_fake
def _backward_fake(
    d_state: Tensor, k: Tensor, v: Tensor, slope: Tensor, counted: Tensor | None, normalise: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dk, dv, d_slope = (x.new_empty(x.shape) for x in (k, v, slope))
    return dk, dv, d_slope


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    k, v, slope, counted, ctx.normalise = inputs
    ctx.save_for_backward(k, v, slope, counted)


def _backward(ctx: Any, d_state: Tensor) -> tuple[Tensor | None, ...]:
    k, v, slope, counted = ctx.saved_tensors
    with torch.autocast(k.device.type, enabled=False):
        dk, dv, d_slope = _backward_op(d_state.contiguous(), k, v, slope, counted, ctx.normalise)
    return dk, dv, d_slope, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Piece(NamedTuple):
    """Some tokens: k (B K, C, Dk); v (B K, C, W); weight (B K, C, G, 1) and age (C,)."""

    place: slice
    k: Tensor
    v: Tensor
    weight: Tensor
    age: Tensor

    def weighted(self) -> Tensor:
        """The keys as every head weights them: (B K, C, G Dk)."""
        return (self.k[:, :, None] * self.weight).flatten(2)


def _pieces(
    k: Tensor, v: Tensor, slope: Tensor, counted: Tensor | None, normalise: bool
) -> Iterator[_Piece]:
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    B, T, K, Dk = k.shape
    rate = slope.to(wide).view(K, 1, -1)
    at_once = max(1, AT_ONCE[kind(k)] // (B * len(slope) * Dk * wide.itemsize))
    for first in range(0, T, at_once):
        place = slice(first, min(first + at_once, T))
        keys, values = (x[:, place].to(wide) for x in (k, v))
        if normalise:
            values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
        if counted is not None:
            values = values * counted[:, place, None, None]
        age = torch.arange(T - 1 - first, T - 1 - place.stop, -1, device=k.device).to(wide)
        weight = torch.exp(-rate * age[:, None]).expand(B, -1, -1, -1).flatten(0, 1)
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))
        yield _Piece(place, keys, values, weight[..., None], age)
