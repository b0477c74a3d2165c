"""The chunked form of causal linear attention in torch, linear in T: for CPUs, and the fallback.

For a chunk of C tokens, a_i the valid tokens of the chunk up to i, L those of the whole chunk and
S the state before it (v has a column of ones where the sum of the weights is asked for)::

    P_ij  = gamma^(a_i - a_j) (q_i . k_j),  j <= i       weights inside the chunk
    o_i   = sum_j P_ij v_j + gamma^(a_i) q_i S
    S'    = gamma^L S + sum_j gamma^(L - a_j) k_j^T v_j

and with dP_ij = gamma^(a_i - a_j) (do_i . v_j), dS' the gradient of the state after the chunk::

    dq_i  = sum_j dP_ij k_j + gamma^(a_i) do_i S^T
    dk_j  = sum_i dP_ij q_i + gamma^(L - a_j) v_j dS'^T
    dv_j  = sum_i P_ij do_i + gamma^(L - a_j) k_j dS'
    dS    = gamma^L dS' + sum_i gamma^(a_i) q_i^T do_i

Every exponent of gamma is >= 0 and local to a chunk: nothing overflows, and the gradient of the
decay sums terms of at most C tokens' age. Backward computes P again; forward keeps one state a
segment of chunks for it. Products are taken in the type of q (float32 for float16); sums, decay
and state are float32; all is float64 for float64 inputs.

Shapes in here: n chunks of C tokens, batch B, K key/value heads, G = H / K query heads for each,
W = Dv + 1 with the column of ones, else Dv. Key/value heads are never repeated: the query heads
of a group are rows, or columns, of one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from supra_torch.ops.chunk_layout import ChunkLayout, Segment, most_segments, segment_chunks


def linear_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :class:`~supra_torch.ops.linear_attention.Operator` says; one custom op, on any device."""
    output, sums, state, _ = _forward_op(q, k, v, slope, initial_state, mask, cu_seqlens, normalise)
    return output, sums, state


@torch.library.custom_op("supra::linear_attention_chunked", mutates_args=())
def _forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, sums, final state, and the state before each segment, (segments, B, H, Dk, W)."""
    output, sums, final, borders = _forward_fake(
        q, k, v, slope, initial_state, mask, cu_seqlens, normalise
    )
    layout = _layout(q, cu_seqlens)
    problem = _Problem.of(q, k, v, slope, mask, normalise, layout)
    out, total = layout.empty_slots(output), layout.empty_slots(sums) if normalise else None
    initial = torch.zeros_like(final) if initial_state is None else initial_state
    final.copy_(initial)
    carry = torch.zeros_like(borders[0])
    for index, segment in enumerate(layout.segments):
        borders[index] = carry
        part = problem.part(segment)
        before, carry = _states(part, layout, carry, initial, final)
        rows = torch.bmm(part.by_head(part.q), part.by_head(part.narrow(before)))
        rows = part.split_heads(rows).mul_(part.powers.grown)
        rows = part.by_group(rows).baddbmm_(part.weights(), part.v)
        _store_output(part, rows, out, total)
    layout.gather(out, output)
    if total is not None:
        layout.gather(total, sums)
    return output, sums, final, borders


@_forward_op.register_fake
def _forward_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, Dk = q.shape
    packed = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = (H, Dk, v.shape[3] + normalise)
    wide = _wide(q.dtype)
    segments = most_segments(T, segment_chunks(B, H), packed)
    return (
        q.new_empty(B, T, H, v.shape[3]),
        q.new_empty((B, T, H) if normalise else (0,), dtype=wide),
        q.new_empty((B if packed is None else packed, *state), dtype=wide),
        q.new_empty((segments, B, *state), dtype=wide),
    )


@torch.library.custom_op("supra::linear_attention_chunked_backward", mutates_args=())
def _backward_op(
    d_output: Tensor,
    d_sums: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    output: Tensor,
    sums: Tensor,
    borders: Tensor,
    slope_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the slope (empty unless asked for) and the initial state."""
    normalise = sums.numel() > 0
    dq, dk, dv, d_slope, d_initial = _backward_fake(
        d_output, d_sums, d_state, q, k, v, slope, initial_state, mask, cu_seqlens, output, sums,
        borders, slope_gradient,
    )  # fmt: skip
    layout = _layout(q, cu_seqlens)
    problem = _Problem.of(q, k, v, slope, mask, normalise, layout)
    d_rows = _RowGradients.of(d_output, d_sums, output, sums, layout)
    dq_, dk_, dv_ = (layout.empty_slots(x) for x in (dq, dk, dv))
    d_slope.zero_()
    d_initial.copy_(d_state)
    initial = torch.zeros_like(d_state) if initial_state is None else initial_state
    unused = torch.empty_like(d_state)
    carry = torch.zeros_like(borders[0])
    for index, segment in reversed(list(enumerate(layout.segments))):
        part = problem.part(segment)
        powers = part.powers
        do = d_rows.part(part)
        before, _ = _states(part, layout, borders[index], initial, unused)

        # Through the reading of the state.
        grown_do = part.split_heads(do).mul(powers.grown)
        narrow = part.by_head(part.narrow(before))
        d_queries = torch.bmm(part.by_head(grown_do), narrow.mT)
        added = torch.bmm(part.by_head(part.q).mT, part.by_head(grown_do))
        after, carry = _state_gradients(part, layout, carry, added, d_state, d_initial)
        if slope_gradient:
            d_slope -= _read_slope(part, d_queries)
            d_slope -= _kept_slope(part, before, after)

        # Through the weights inside the chunks.
        weights = part.weights()
        d_weights = torch.bmm(do, part.v.mT)
        if slope_gradient:
            d_slope -= _weights_slope(part, weights, d_weights)
        part.split_heads(d_weights).mul_(powers.inner)
        d_queries = part.by_group(d_queries).baddbmm_(d_weights, part.k)
        d_keys = torch.bmm(d_weights.mT, part.q)
        d_values = torch.bmm(weights.mT, do)

        # Through the writing of the state.
        narrow = part.narrow(after).view(len(part.k), -1, part.v.shape[-1])
        written = torch.bmm(part.v, narrow.mT)
        if slope_gradient:
            d_slope -= _write_slope(part, written)
        written = part.split_groups(written).mul_(powers.left).sum(-2)
        d_keys += written.view(d_keys.shape)
        d_values.baddbmm_(part.decayed_keys, narrow)

        part.store_queries(d_queries, dq_)
        part.store_keys(d_keys, dk_)
        part.store_keys(d_values, dv_)
    for found, slots in ((dq, dq_), (dk, dk_), (dv, dv_)):
        layout.gather(slots, found)
    return dq, dk, dv, d_slope, d_initial


@_backward_op.register_fake
def _backward_fake(
    d_output: Tensor,
    d_sums: Tensor,
    d_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    output: Tensor,
    sums: Tensor,
    borders: Tensor,
    slope_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    d_slope = slope.new_empty(slope.shape if slope_gradient else (0,), dtype=_wide(q.dtype))
    return dq, dk, dv, d_slope, d_state.new_empty(d_state.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, normalise = inputs
    out, sums, _, borders = output
    # The output is needed for the gradient of its divisor only.
    ctx.save_for_backward(*tensors, out if normalise else out.new_empty(0), sums, borders)


def _backward(
    ctx: Any, d_output: Tensor, d_sums: Tensor, d_state: Tensor, _: Tensor
) -> tuple[Tensor | None, ...]:
    q, k, v, slope, initial_state, mask, cu_seqlens, output, sums, borders = ctx.saved_tensors
    slope_gradient = ctx.needs_input_grad[3]
    dq, dk, dv, d_slope, d_initial = _backward_op(
        d_output, d_sums, d_state, q, k, v, slope, initial_state, mask, cu_seqlens, output, sums,
        borders, slope_gradient,
    )  # fmt: skip
    return (
        dq,
        dk,
        dv,
        d_slope.to(slope.dtype) if slope_gradient else None,
        None if initial_state is None else d_initial.to(initial_state.dtype),
        None,
        None,
        None,
    )


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@dataclass(frozen=True)
class _Powers:
    """Powers of gamma inside chunks; ... is nothing where all chunks are alike, else (n, B)."""

    ages: Tensor  # a, (..., C)
    inner: Tensor  # gamma^(a_i - a_j), 0 where j is later or not valid: (..., H, C, C)
    grown: Tensor  # gamma^(a_i): (..., H, C, 1)
    left: Tensor  # gamma^(L - a_j), 0 where j is not valid: (..., K, C, G, 1)
    kept: Tensor  # gamma^L, in the type of the state: (..., H, 1, 1)

    @staticmethod
    def of(slope: Tensor, valid: Tensor, key_heads: int, dtype: torch.dtype) -> _Powers:
        """slope (H,); valid (..., C) 1 for tokens that write and decay; products' ``dtype``."""
        ages = valid.cumsum(-1)
        last = ages[..., -1:]
        rate = slope[:, None]
        seen = torch.ones_like(valid[..., None] * valid[..., None, :]).tril_()
        seen *= valid[..., None, :]
        exponent = _distances(ages)[..., None, :, :]
        inner = torch.exp(-rate[..., None] * exponent).mul_(seen[..., None, :, :])
        left = torch.exp(-rate * (last - ages)[..., None, :]) * valid[..., None, :]
        return _Powers(
            ages,
            inner.to(dtype),
            torch.exp(-rate * ages[..., None, :])[..., None].to(dtype),
            left.unflatten(-2, (key_heads, -1)).transpose(-1, -2)[..., None].to(dtype),
            torch.exp(-rate * last[..., None, :])[..., None],
        )


def _distances(ages: Tensor) -> Tensor:
    """a_i - a_j for j <= i, else 0: (..., C) -> (..., C, C)."""
    return (ages[..., :, None] - ages[..., None, :]).clamp_(min=0)


@dataclass
class _Problem:
    """The operands in slots, of which :meth:`part` loads a segment."""

    q: Tensor
    k: Tensor
    v: Tensor
    slope: Tensor
    valid: Tensor | None
    normalise: bool
    powers: dict[int, _Powers]  # of chunks whose slots are all valid, by their size

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        slope: Tensor,
        mask: Tensor | None,
        normalise: bool,
        layout: ChunkLayout,
    ) -> _Problem:
        q, k, v = (layout.spread(x) for x in (q, k, v))
        return _Problem(q, k, v, slope.to(_wide(q.dtype)), layout.valid(mask), normalise, {})

    def part(self, segment: Segment) -> _Part:
        n, C = segment.chunks, segment.size
        B, _, H, Dk = self.q.shape
        K, Dv = self.v.shape[2:]
        G, dtype = H // K, _narrow(self.q.dtype)
        q = self.q.new_empty(n, B, K, G, C, Dk, dtype=dtype)
        q.copy_(_in_chunks(self.q, segment).unflatten(3, (K, G)).permute(1, 0, 3, 4, 2, 5))
        k = self.k.new_empty(n, B, K, C, Dk, dtype=dtype)
        k.copy_(_in_chunks(self.k, segment).permute(1, 0, 3, 2, 4))
        v = self.v.new_empty(n, B, K, C, Dv + self.normalise, dtype=dtype)
        v[..., :Dv].copy_(_in_chunks(self.v, segment).permute(1, 0, 3, 2, 4))
        if self.normalise:
            v[..., Dv] = 1.0
        powers = self._powers(segment, K, dtype)
        decayed_keys = k.new_empty(n, B, K, C, G, Dk)
        torch.mul(k[..., None, :], powers.left, out=decayed_keys)
        return _Part(
            segment,
            (n, B, K, G, C),
            powers,
            q.view(n * B * K, G * C, Dk),
            k.view(n * B * K, C, Dk),
            v.view(n * B * K, C, v.shape[-1]),
            decayed_keys.view(n * B * K, C, G * Dk),
        )

    def _powers(self, segment: Segment, K: int, dtype: torch.dtype) -> _Powers:
        if self.valid is not None:
            valid = _in_chunks(self.valid, segment).transpose(0, 1).to(self.slope.dtype)
            return _Powers.of(self.slope, valid, K, dtype)
        if segment.size not in self.powers:
            ones = self.slope.new_ones(segment.size)
            self.powers[segment.size] = _Powers.of(self.slope, ones, K, dtype)
        return self.powers[segment.size]


@dataclass(frozen=True)
class _Part:
    """A segment's operands, head first; ``sizes`` are (n, B, K, G, C)."""

    segment: Segment
    sizes: tuple[int, int, int, int, int]
    powers: _Powers
    q: Tensor  # (n B K, G C, Dk)
    k: Tensor  # (n B K, C, Dk)
    v: Tensor  # (n B K, C, W)
    decayed_keys: Tensor  # gamma^(L - a_j) k_j, (n B K, C, G Dk)

    def weights(self) -> Tensor:
        """P, (n B K, G C, C)."""
        weights = torch.bmm(self.q, self.k.mT)
        self.split_heads(weights).mul_(self.powers.inner)
        return weights

    def narrow(self, state: Tensor) -> Tensor:
        """A state in the type of the products."""
        return state.to(self.q.dtype)

    def split_heads(self, x: Tensor) -> Tensor:
        """Rows of any shape with width D -> (n, B, H, C, D)."""
        n, B, K, G, C = self.sizes
        return x.view(n, B, K * G, C, x.shape[-1])

    def split_groups(self, x: Tensor) -> Tensor:
        """(n B K, C, G D) -> (n, B, K, C, G, D)."""
        n, B, K, G, C = self.sizes
        return x.view(n, B, K, C, G, -1)

    def by_head(self, x: Tensor) -> Tensor:
        """Rows or states of every head -> (n B H, rows of a head, D), for matrix products."""
        n, B, K, G, _ = self.sizes
        return x.view(n * B * K * G, -1, x.shape[-1])

    def by_group(self, x: Tensor) -> Tensor:
        """Rows of every head -> (n B K, G C, D), for matrix products."""
        n, B, K, G, C = self.sizes
        return x.view(n * B * K, G * C, x.shape[-1])

    def rows_of(self, x: Tensor) -> Tensor:
        """This segment of x (B, S, H, ...), head first: a view, (n, B, K, G, C, ...)."""
        x = _in_chunks(x, self.segment).unflatten(3, self.sizes[2:4])
        return x.permute(1, 0, 3, 4, 2, *range(5, x.dim()))

    def store_queries(self, x: Tensor, out: Tensor) -> None:
        """Rows of every query head into their slots of out (B, S, H, D)."""
        rows = self.rows_of(out)
        rows.copy_(x.view(rows.shape))

    def store_keys(self, x: Tensor, out: Tensor) -> None:
        """Rows (n B K, C, D or more columns) into their slots of out (B, S, K, D)."""
        rows = _in_chunks(out, self.segment).permute(1, 0, 3, 2, 4)
        rows.copy_(x.view(*rows.shape[:4], -1)[..., : rows.shape[-1]])


@dataclass(frozen=True)
class _RowGradients:
    """Gradients of the rows that the products make, before the division by the sum."""

    d_output: Tensor
    inverse: Tensor | None  # 1 / sum, (B, S, H)
    d_sum: Tensor | None  # (B, S, H)

    @staticmethod
    def of(
        d_output: Tensor, d_sums: Tensor, output: Tensor, sums: Tensor, layout: ChunkLayout
    ) -> _RowGradients:
        if sums.numel() == 0:
            return _RowGradients(layout.spread(d_output), None, None)
        inverse = torch.where(sums == 0, 0.0, 1.0 / sums)
        d_sum = d_sums - (d_output * output).sum(-1, dtype=sums.dtype) * inverse
        return _RowGradients(*(layout.spread(x) for x in (d_output, inverse, d_sum)))

    def part(self, part: _Part) -> Tensor:
        """(n B K, G C, W)."""
        d_output = part.rows_of(self.d_output)
        Dv = d_output.shape[-1]
        rows = part.v.new_empty(*part.sizes, part.v.shape[-1])
        if self.inverse is None or self.d_sum is None:
            rows.copy_(d_output)
        else:
            torch.mul(d_output, part.rows_of(self.inverse)[..., None], out=rows[..., :Dv])
            rows[..., Dv] = part.rows_of(self.d_sum)
        return part.by_group(rows)


def _store_output(part: _Part, rows: Tensor, out: Tensor, total: Tensor | None) -> None:
    """Rows (n B K, G C, W), divided by their last column if there is a total to store it in."""
    rows = rows.view(*part.sizes, -1)
    into = part.rows_of(out)
    if total is None:
        into.copy_(rows)
        return
    sums = rows[..., -1:].to(total.dtype)
    part.rows_of(total).copy_(sums[..., 0])
    # Where nothing was written the numerator is 0 as well.
    torch.div(rows[..., :-1], sums.masked_fill_(sums == 0, float("inf")), out=into)


def _states(
    part: _Part, layout: ChunkLayout, carry: Tensor, initial: Tensor, final: Tensor
) -> tuple[Tensor, Tensor]:
    """The states before each chunk, (n, B, H, Dk, W), and after the last one.

    ``carry`` is the state before the segment; sequences take theirs from ``initial`` where they
    begin and leave it in ``final`` where they end.
    """
    n = part.sizes[0]
    states = carry.new_empty(n + 1, *carry.shape)
    states[0] = carry
    states[1:] = torch.bmm(part.decayed_keys.mT, part.v).view(n, *carry.shape)
    for i in range(n):
        chunk = part.segment.first_chunk + i
        if chunk in layout.starts:
            states[i] = initial[layout.starts[chunk]]
        states[i + 1].addcmul_(_of_chunk(part.powers.kept, i), states[i])
        if chunk in layout.ends:
            final[layout.ends[chunk]] = states[i + 1]
    return states[:n], states[n]


def _state_gradients(
    part: _Part,
    layout: ChunkLayout,
    carry: Tensor,
    added: Tensor,
    d_final: Tensor,
    d_initial: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of the states after each chunk, and of that before the first one.

    ``added`` (n B H, Dk, W) is what a chunk's reading of its state adds; ``carry`` the gradient
    of the state after the segment.
    """
    n = part.sizes[0]
    states = carry.new_empty(n + 1, *carry.shape)
    states[:n] = added.view(n, *carry.shape)
    states[n] = carry
    for i in reversed(range(n)):
        chunk = part.segment.first_chunk + i
        if chunk in layout.ends:
            states[i + 1] = d_final[layout.ends[chunk]]
        states[i].addcmul_(_of_chunk(part.powers.kept, i), states[i + 1])
        if chunk in layout.starts:
            d_initial[layout.starts[chunk]] = states[i]
    return states[1:], states[0]


def _of_chunk(kept: Tensor, i: int) -> Tensor:
    return kept if kept.dim() == 3 else kept[i]


# The slope's gradient, each part with its sign turned: a weight gamma^a = exp(-slope a) times
# its gradient times its exponent a, summed over everything but the heads.


def _read_slope(part: _Part, d_queries: Tensor) -> Tensor:
    """gamma^(a_i) q_i S: ``d_queries`` is its share of dq."""
    products = part.split_heads(d_queries * part.by_head(part.q))
    by_row = products.sum(-1, dtype=part.powers.ages.dtype)  # (n, B, H, C)
    return (by_row * part.powers.ages[..., None, :]).sum((0, 1, 3))


def _kept_slope(part: _Part, before: Tensor, after: Tensor) -> Tensor:
    """gamma^L S: the state before each chunk, and the gradient of that after it."""
    last = part.powers.ages[..., None, -1]
    rows, columns = before.flatten(0, 2).flatten(1), after.flatten(0, 2).flatten(1)
    by_head = torch.bmm(rows[:, None], columns[..., None]).view(before.shape[:3])
    return (by_head * part.powers.kept[..., 0, 0] * last).sum((0, 1))


def _weights_slope(part: _Part, weights: Tensor, d_weights: Tensor) -> Tensor:
    """P: ``d_weights`` before it is multiplied by the power of gamma."""
    ages = part.powers.ages
    products = part.split_heads(weights * d_weights)
    products.mul_(_distances(ages)[..., None, :, :].to(products.dtype))
    return products.sum((0, 1, 3, 4), dtype=ages.dtype)


def _write_slope(part: _Part, written: Tensor) -> Tensor:
    """gamma^(L - a_j) k_j^T v_j: ``written`` is v_j dS'^T, (n B K, C, G Dk)."""
    ages = part.powers.ages
    products = part.split_groups(written * part.decayed_keys)
    by_row = products.sum(-1, dtype=ages.dtype)  # (n, B, K, C, G)
    by_row *= (ages[..., -1:] - ages)[..., None, :, None]
    return by_row.sum((0, 1, 3)).flatten()


def _in_chunks(x: Tensor, segment: Segment) -> Tensor:
    """The segment's slots of x (B, S, ...): a view, (B, n, C, ...)."""
    return x[:, segment.slots].unflatten(1, (segment.chunks, segment.size))


def _layout(q: Tensor, cu_seqlens: Tensor | None) -> ChunkLayout:
    B, T, H, _ = q.shape
    per_segment = segment_chunks(B, H)
    if cu_seqlens is None:
        return ChunkLayout.rows(T, per_segment)
    return ChunkLayout.packed(cu_seqlens, T, per_segment)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type of sums, decay and state."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _narrow(dtype: torch.dtype) -> torch.dtype:
    """The type of the products: a float16 product may be above 65,504."""
    return torch.float32 if dtype == torch.float16 else dtype
