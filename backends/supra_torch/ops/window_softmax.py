"""Softmax over a window of keys and one more slot for all that came before it.

With W the window, j <= t, and for each query a far average f_t of logarithmic mass m_t::

    s_tj = q_t . k_j / sqrt(d),  t - W < j
    o_t  = (sum_j exp(s_tj) v_j + exp(m_t) f_t) / (sum_j exp(s_tj) + exp(m_t))

Blocks of C queries see C + W slots, of which the first is W + 1 tokens before the second query
and more before every other: no query sees it, so its column holds m_t, and one softmax does both.
Backward computes the weights again. Products are taken in the type of q (float32 for float16),
the softmax in float32, all in float64 for float64 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from supra_torch.ops.target import kind

# W of the C + W scores of a row are used: smaller blocks waste fewer, larger products run faster.
BLOCK = {"cpu": 32, "cuda": 64}
# Queries times heads worked on at once: on a CPU their buffers stay in the caches, a GPU is to be
# filled by few launches.
SEGMENT_ROWS = {"cpu": 9216, "cuda": 2**19}
# Finite, since a row of minus infinities would be NaN.
NEVER = -1e30


def window_softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    far: Tensor,
    far_mass: Tensor,
    window: int,
) -> Tensor:
    """q (B, T, H, d); k (B, W + T, K, d) and v (B, W + T, K, Dv), W tokens before the first query.

    documents (B, W + T) integers: the document that each token belongs to, negative for none; a
    query sees its own alone. None where all are tokens of one but the W in front. far
    (B, T, H, Dv); far_mass (B, T, H), at least -1e30. Returns (B, T, H, Dv) in q's type; what no
    token asks gets some average.
    """
    output: Tensor = _forward_op(q, k, v, documents, far, far_mass, window)
    return output


@torch.library.custom_op("supra::window_softmax", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    far: Tensor,
    far_mass: Tensor,
    window: int,
) -> Tensor:
    output = _forward_fake(q, k, v, documents, far, far_mass, window)
    for part in _parts(q, k, v, documents, far, far_mass, window):
        weights = part.weights()
        rows = part.split(torch.bmm(weights.to(part.q.dtype), part.v))
        far_weight = part.split(weights)[..., :1].to(rows.dtype)
        part.rows_of(output).copy_(rows.addcmul_(far_weight, part.rows_of(far).to(rows.dtype)))
    return output


@_forward_op.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    far: Tensor,
    far_mass: Tensor,
    window: int,
) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.custom_op("supra::window_softmax_backward", mutates_args=())
def _backward_op(
    d_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    far: Tensor,
    far_mass: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, far and far_mass."""
    dq, dk, dv, d_far, d_mass = _backward_fake(d_output, q, k, v, documents, far, far_mass, window)
    wide = _wide(q.dtype)
    dk_sum, dv_sum = (torch.zeros_like(x, dtype=wide) for x in (dk, dv))
    for part in _parts(q, k, v, documents, far, far_mass, window):
        weights = part.weights()
        narrow = weights.to(part.q.dtype)
        do = part.load(d_output)
        part.add_windows(torch.bmm(narrow.mT, do), dv_sum)

        do_rows = part.split(do)
        far_rows = part.rows_of(far).to(do.dtype)
        torch.mul(do_rows, part.split(weights)[..., :1].to(do.dtype), out=part.rows_of(d_far))
        d_weights = torch.bmm(do, part.v.mT).to(weights.dtype)
        part.split(d_weights)[..., 0] = (do_rows * far_rows).sum(-1, dtype=weights.dtype)
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, weights.dtype)
        part.rows_of(d_mass).copy_(part.split(d_scores)[..., 0])

        narrow = d_scores.to(part.q.dtype)
        scale = part.scale
        part.rows_of(dq).copy_(part.split(torch.bmm(narrow, part.k).mul_(scale)))
        part.add_windows(torch.bmm(narrow.mT, part.q).mul_(scale), dk_sum)
    dk.copy_(dk_sum)
    dv.copy_(dv_sum)
    return dq, dk, dv, d_far, d_mass


@_backward_op.register_fake
def _backward_fake(
    d_output: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    far: Tensor,
    far_mass: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, d_far, d_mass = (x.new_empty(x.shape) for x in (q, k, v, far, far_mass))
    return dq, dk, dv, d_far, d_mass


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, d_far, d_mass = _backward_op(d_output, *ctx.saved_tensors, ctx.window)
    return dq, dk, dv, None, d_far, d_mass, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True)
class _Part:
    """n blocks of C queries from ``start`` on, head first; S = C + W slots a block."""

    start: int
    sizes: tuple[int, int, int, int, int]  # n, B, K, G, C
    q: Tensor  # (n B K, G C, d)
    k: Tensor  # (n B K, S, d), zeros in the first slot
    v: Tensor  # (n B K, S, Dv), zeros in the first slot
    bias: Tensor  # 0 where a query sees a slot, else NEVER: (C, S) or (n, B or 1, 1, 1, C, S)
    far_mass: Tensor  # (n, B, K, G, C)

    @property
    def scale(self) -> float:
        return 1.0 / math.sqrt(self.q.shape[-1])

    def weights(self) -> Tensor:
        """(n B K, G C, S), the far part's in the first slot."""
        scores = torch.bmm(self.q, self.k.mT).to(self.bias.dtype).mul_(self.scale)
        split = self.split(scores)
        split += self.bias
        split[..., 0] = self.far_mass
        return torch.softmax(scores, dim=-1)

    def split(self, x: Tensor) -> Tensor:
        """(n B K, G C, D) -> (n, B, K, G, C, D)."""
        return x.view(*self.sizes, x.shape[-1])

    def rows_of(self, x: Tensor) -> Tensor:
        """These queries' rows of x (B, T, H, ...): a view, (n, B, K, G, C, ...)."""
        return _rows_of(x, self.start, self.sizes)

    def load(self, x: Tensor) -> Tensor:
        """These queries' rows of x (B, T, H, D), copied: (n B K, G C, D)."""
        n, B, K, G, C = self.sizes
        rows = self.q.new_empty(*self.sizes, x.shape[-1]).copy_(self.rows_of(x))
        return rows.view(n * B * K, G * C, x.shape[-1])

    def add_windows(self, windows: Tensor, out: Tensor) -> None:
        """Add windows (n B K, S, D), but for their first slot, to out (B, W + T, K, D)."""
        n, B, K, _, C = self.sizes
        windows = windows.view(n, B, K, -1, windows.shape[-1]).permute(1, 0, 3, 2, 4)
        windows[:, :, 0] = 0.0
        for first in range(0, windows.shape[2], C):
            piece = windows[:, :, first : first + C]
            begin = self.start + first
            if piece.shape[2] < C and n > 1:
                # The last piece of a window that is no multiple of the block.
                rows = out[:, begin : begin + (n - 1) * C].unflatten(1, (n - 1, C))
                rows[:, :, : piece.shape[2]] += piece[:, :-1]
                begin, piece = begin + (n - 1) * C, piece[:, -1:]
            count = piece.shape[1] * piece.shape[2]
            rows = out[:, begin : begin + count].unflatten(1, piece.shape[1:3])
            rows += piece


def _parts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    far: Tensor,
    far_mass: Tensor,
    window: int,
) -> Iterator[_Part]:
    B, T, H, _ = q.shape
    block, rows = (sizes.get(kind(q), sizes["cpu"]) for sizes in (BLOCK, SEGMENT_ROWS))
    whole, rest = divmod(T, block)
    at_once = max(1, rows // (block * B * H))
    for first in range(0, whole, at_once):
        n = min(at_once, whole - first)
        yield _part(q, k, v, documents, far_mass, window, first * block, n, block)
    if rest:
        yield _part(q, k, v, documents, far_mass, window, whole * block, 1, rest)


def _part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Tensor | None,
    far_mass: Tensor,
    window: int,
    start: int,
    n: int,
    C: int,
) -> _Part:
    B, _, H, d = q.shape
    K = k.shape[2]
    G, S = H // K, C + window
    sizes = (n, B, K, G, C)
    dtype = _narrow(q.dtype)
    rows = q.new_empty(*sizes, d, dtype=dtype).copy_(_rows_of(q, start, sizes))

    def windows(x: Tensor) -> Tensor:
        blocks = x[:, start : start + (n - 1) * C + S].unfold(1, S, C)  # (B, n, K, D, S)
        out = x.new_empty(n, B, K, S, x.shape[3], dtype=dtype)
        out.copy_(blocks.permute(1, 0, 2, 4, 3))
        out[..., 0, :] = 0.0
        return out.view(n * B * K, S, x.shape[3])

    return _Part(
        start,
        sizes,
        rows.view(n * B * K, G * C, d),
        windows(k),
        windows(v),
        _bias(documents, window, start, sizes, q.device, _wide(q.dtype)),
        _rows_of(far_mass, start, sizes),
    )


def _bias(
    documents: Tensor | None,
    window: int,
    start: int,
    sizes: tuple[int, int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    n, _, _, _, C = sizes
    S = C + window
    i = torch.arange(C, device=device)[:, None]
    j = torch.arange(S, device=device)
    seen = (j > i) & (j <= i + window)
    slots = slice(start, start + (n - 1) * C + S)
    if documents is not None:
        queries = documents[:, window + start : window + start + n * C].unflatten(1, (n, C))
        seen = _and_blocks(seen, documents[:, slots], queries)
    elif start < window:
        place = torch.arange(slots.start, slots.stop, device=device)
        inside = (place >= window).int()[None]
        seen = _and_blocks(seen, inside, inside.new_ones(1, n, C))
    return torch.zeros(seen.shape, device=device, dtype=dtype).masked_fill_(~seen, NEVER)


def _and_blocks(band: Tensor, slots: Tensor, queries: Tensor) -> Tensor:
    """band (C, S) where slots (b, (n - 1) C + S) equal queries (b, n, C): (n, b, 1, 1, C, S)."""
    C, S = band.shape
    same = slots.unfold(1, S, C)[:, :, None] == queries[..., None]
    return (band & same).transpose(0, 1)[:, :, None, None]


def _rows_of(x: Tensor, start: int, sizes: tuple[int, int, int, int, int]) -> Tensor:
    n, _, K, G, C = sizes
    x = x[:, start : start + n * C].unflatten(1, (n, C)).unflatten(3, (K, G))
    return x.permute(1, 0, 3, 4, 2, *range(5, x.dim()))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type of the softmax and of sums."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _narrow(dtype: torch.dtype) -> torch.dtype:
    """The type of the products."""
    return torch.float32 if dtype == torch.float16 else dtype
