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

# Tokens whose keys are weighted at once.
_AT_ONCE = 1024


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
    by_head = state.view(k.shape[0], k.shape[2], -1, state.shape[-1])
    for piece in _pieces(k, v, slope, counted, normalise):
        weighted = piece.k[:, :, None] * piece.weight
        by_head += weighted.transpose(2, 3).flatten(3).mT @ piece.v
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
    K = k.shape[2]
    # (B, K, G Dk, W)
    by_head = d_state.unflatten(1, (K, -1)).flatten(2, 3)
    total = torch.zeros_like(d_slope).view(K, -1)
    for piece in _pieces(k, v, slope, counted, normalise):
        pairs = (piece.v @ by_head.mT).unflatten(3, (-1, k.shape[3])).transpose(2, 3)
        d_keys = pairs * piece.weight
        dk[:, piece.place] = d_keys.sum(2).transpose(1, 2)
        total -= (d_keys * piece.k[:, :, None]).sum((0, 4)).mul_(piece.age).sum(2)
        weighted = (piece.k[:, :, None] * piece.weight).transpose(2, 3).flatten(3)
        d_values = (weighted @ by_head)[..., : v.shape[3]].transpose(1, 2)
        if counted is not None:
            d_values = d_values * counted[:, piece.place, None, None]
        dv[:, piece.place] = d_values
    d_slope.copy_(total.flatten())
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
    dk, dv, d_slope = _backward_op(d_state.contiguous(), k, v, slope, counted, ctx.normalise)
    return dk, dv, d_slope, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class _Piece(NamedTuple):
    """Some tokens: k (B, K, C, Dk); v (B, K, C, W); weight (K, G, C, 1) and age (C,)."""

    place: slice
    k: Tensor
    v: Tensor
    weight: Tensor
    age: Tensor


def _pieces(
    k: Tensor, v: Tensor, slope: Tensor, counted: Tensor | None, normalise: bool
) -> Iterator[_Piece]:
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32
    T, K = k.shape[1:3]
    rate = slope.to(wide).view(K, -1, 1)
    for first in range(0, T, _AT_ONCE):
        place = slice(first, min(first + _AT_ONCE, T))
        keys, values = (x[:, place].to(wide) for x in (k, v))
        if normalise:
            values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
        if counted is not None:
            values = values * counted[:, place, None, None]
        age = torch.arange(T - 1 - first, T - 1 - place.stop, -1, device=k.device).to(wide)
        weight = torch.exp(-rate * age)[..., None]
        yield _Piece(place, keys.transpose(1, 2), values.transpose(1, 2), weight, age)
