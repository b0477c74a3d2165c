"""Linear attention with a softmax window in MLX: prefill, and the decode step on a ring.

As in :mod:`supra_mlx.ops` everything is computed in float32, and no power overflows.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from supra_mlx.ops import weighted_sum, with_ones

# Scores of keys that a query must not see; finite, so that a row without any key stays finite.
_MASKED = -1e30


class WindowMemory(NamedTuple):
    """What a windowed layer remembers; all zeros before the first token.

    state (B, H, Dk, Dv + 1) float32: the tokens that have left the window; keys (B, K, W, d),
    values (B, K, W, Dv), features (B, K, W, Dk): a ring of the last W, a row's token n at slot
    n mod W.
    """

    state: mx.array
    keys: mx.array
    values: mx.array
    features: mx.array


def windowed_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    phi_q: mx.array,
    phi_k: mx.array,
    decay: mx.array,
    log_far_gain: mx.array,
    window: int,
    *,
    log_sink: mx.array | None = None,
    memory: WindowMemory | None = None,
    seen: mx.array | None = None,
    mask: mx.array | None = None,
    chunk_size: int = 64,
) -> tuple[mx.array, WindowMemory]:
    """Softmax weights for the last W tokens, linear weights before them, one sum for both::

        w_tj = exp(q_t . k_j / sqrt(d))                                   t - W < j <= t
        w_tj = exp(log_far_gain) gamma^(t - W - j) (phi(q_t) . phi(k_j))  j <= t - W
        o_t  = sum_j w_tj v_j / (sink_t + sum_j w_tj)

    sink_t is exp(log_sink) where any token before the window has a weight, else 0.

    q (B, T, H, d) and k (B, T, K, d) are what the activation receives; v (B, T, K, Dv), phi_q
    (B, T, H, Dk) and phi_k (B, T, K, Dk) >= 0; decay, log_far_gain and log_sink (H,), None for
    no sink; mask (B, T) bool: False tokens are left out, and their output means nothing.
    ``memory`` comes with ``seen`` (B,) int32, the tokens that were not left out of it. Returns
    the output (B, T, H, Dv) in q's type and the memory. Memory use is linear in T.
    """
    B, T, H, _ = q.shape
    if memory is None:
        memory, seen = empty_window(window, k, v, phi_k, H), None
    if seen is None:
        seen = mx.zeros((B,), dtype=mx.int32)
    if log_sink is None:
        log_sink = mx.full((H,), _MASKED)
    if T == 1 and mask is None:
        output, *after = _one_token(
            q, k, v, phi_q, phi_k, decay, log_far_gain, log_sink, *memory, seen
        )
        memory = WindowMemory(*after)
    else:
        inputs = (q, k, v, phi_q, phi_k)
        output, memory = _many(
            inputs, decay, log_far_gain, log_sink, memory, seen, window, mask, chunk_size
        )
    return output.astype(q.dtype), memory


def empty_window(
    window: int, k: mx.array, v: mx.array, phi_k: mx.array, heads: int
) -> WindowMemory:
    """The memory before the first token, for keys, values and features like these."""
    B, _, K, Dv = v.shape

    def buffer(x: mx.array) -> mx.array:
        return mx.zeros((B, K, window, x.shape[-1]), dtype=x.dtype)

    state = mx.zeros((B, heads, phi_k.shape[-1], Dv + 1))
    return WindowMemory(state, buffer(k), buffer(v), buffer(phi_k))


def in_order(memory: WindowMemory, seen: mx.array) -> tuple[mx.array, ...]:
    """Keys, values and features (B, W, K, D) of the ring, newest last, and valid (B, W) bool."""
    W = memory.keys.shape[2]
    places = mx.arange(W)
    slots = (seen[:, None] + places) % W
    buffers = (_take_slots(x, slots).swapaxes(1, 2) for x in memory[1:])
    return *buffers, places >= W - seen[:, None]


# --- one token ------------------------------------------------------------------------------


@mx.compile
def _one_token(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    phi_q: mx.array,
    phi_k: mx.array,
    decay: mx.array,
    log_far_gain: mx.array,
    log_sink: mx.array,
    state: mx.array,
    keys: mx.array,
    values: mx.array,
    features: mx.array,
    seen: mx.array,
) -> tuple[mx.array, ...]:
    """One token more in every row: what it pushes out of the ring goes into the state.

    Returns the output and the new memory. On a CPU a step is made of so many small operations
    that compiling the whole saves a tenth of it.
    """
    B, _, H, d = q.shape
    window = keys.shape[2]
    K, Dv = v.shape[2:]
    heads = (B, K, H // K)
    slot = seen % window
    # Before W tokens have been seen, zeros leave: they write nothing.
    v_left, phi_left = (_at(x, slot).swapaxes(1, 2) for x in (values, features))
    far, state = weighted_sum(phi_q, phi_left, with_ones(v_left), decay, state, None, 1)
    far = far.reshape(*heads, Dv + 1)
    keys, values, features = (
        _put(buffer, slot, x.swapaxes(1, 2).astype(buffer.dtype))
        for buffer, x in ((keys, k), (values, v), (features, phi_k))
    )
    scores = q.reshape(*heads, d).astype(mx.float32) @ keys.astype(mx.float32).swapaxes(-1, -2)
    scores = mx.where(
        (mx.arange(window) <= seen[:, None])[:, None, None], scores * d**-0.5, _MASKED
    )
    gains = (x.astype(mx.float32).reshape(*heads[1:], 1) for x in (log_far_gain, log_sink))
    average, *masses = _far_part(far[..., :-1], far[..., -1:], *gains)
    # One softmax over the window's slots, the far part and the sink.
    weights = mx.softmax(mx.concatenate([scores, *masses], axis=-1), axis=-1, precise=True)
    output = weights[..., :window] @ values.astype(mx.float32)
    output = output + weights[..., window : window + 1] * average
    return output.reshape(B, 1, H, Dv), state, keys, values, features


def _far_part(
    far: mx.array, mass: mx.array, log_far_gain: mx.array, log_sink: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The far part's average (..., Dv), its logarithmic mass and the sink's (..., 1).

    ``far`` are sums of values, ``mass`` of their weights; where nothing has left the window yet
    neither part has a mass.
    """
    written = mass > 0.0
    safe = mx.where(written, mass, 1.0)
    log_far = mx.where(written, mx.log(safe) + log_far_gain, _MASKED)
    return far / safe, log_far, mx.where(written, log_sink, _MASKED)


def _at(buffer: mx.array, slot: mx.array) -> mx.array:
    """(B, K, 1, D) of (B, K, W, D), each row at its own slot."""
    if buffer.shape[0] == 1:
        B, K, _, D = buffer.shape
        return mx.slice(buffer, slot, (2,), (B, K, 1, D))
    return _take_slots(buffer, slot[:, None])


def _put(buffer: mx.array, slot: mx.array, x: mx.array) -> mx.array:
    """The buffer with x (B, K, 1, D) there."""
    if buffer.shape[0] == 1:
        return mx.slice_update(buffer, x, slot, (2,))
    slots = mx.broadcast_to(slot[:, None, None, None], x.shape)
    return mx.put_along_axis(buffer, slots, x, axis=2)


def _take_slots(buffer: mx.array, slots: mx.array) -> mx.array:
    """(B, K, n, D) of (B, K, W, D) at slots (B, n)."""
    return mx.take_along_axis(buffer, slots[:, None, :, None], axis=2)


# --- many tokens ----------------------------------------------------------------------------


def _many(
    inputs: tuple[mx.array, ...],
    decay: mx.array,
    log_far_gain: mx.array,
    log_sink: mx.array,
    memory: WindowMemory,
    seen: mx.array,
    window: int,
    mask: mx.array | None,
    chunk_size: int,
) -> tuple[mx.array, WindowMemory]:
    """Any number of tokens, masked or not, with the ring laid out in order."""
    q, k, v, phi_q, phi_k = inputs
    B, T = q.shape[:2]
    order = None
    if mask is not None:
        order = _valid_last(mask)
        q, phi_q = _take(q, order), _take(phi_q, order)
        # What is not valid may stay in the window's unused slots and must never write.
        phi_k = mx.where(mask[:, :, None, None], phi_k, mx.zeros_like(phi_k))
    new = mx.ones((B, T), dtype=mx.bool_) if mask is None else mask
    *before, known = in_order(memory, seen)
    valid = mx.concatenate([known, new], axis=1)
    k, v, phi_k = (
        mx.concatenate([old.astype(x.dtype), x], axis=1)
        for old, x in zip(before, (k, v, phi_k), strict=True)
    )
    if mask is not None:
        together = _valid_last(valid)
        k, v, phi_k = (_take(x, together) for x in (k, v, phi_k))
        valid = mx.take_along_axis(valid, together, axis=1)
    # Query i stands at slot W + i and sees slots i + 1 ... W + i: slot i has just left.
    far, state = weighted_sum(
        phi_q, phi_k[:, :T], with_ones(v[:, :T]), decay, memory.state,
        None if mask is None else valid[:, :T], chunk_size,
    )  # fmt: skip
    near, top = _window_sums(q, k, with_ones(v), valid, window, chunk_size)
    output = _join(
        near[..., :-1], near[..., -1:], top, far[..., :-1], far[..., -1:],
        log_far_gain[:, None], log_sink[:, None],
    )  # fmt: skip
    if order is not None:
        output = _take(output, mx.argsort(order, axis=1))
    total = seen + new.sum(axis=1)
    slots = (mx.arange(window) - total[:, None]) % window
    buffers = (_take_slots(x[:, T:].swapaxes(1, 2), slots) for x in (k, v, phi_k))
    return output, WindowMemory(state, *buffers)


def _window_sums(
    q: mx.array, k: mx.array, v: mx.array, valid: mx.array, window: int, chunk_size: int
) -> tuple[mx.array, mx.array]:
    """sum_j exp(s_ij - top_i) v_j over the window, and top_i the largest score s_ij.

    q (B, T, H, d); k, v (B, W + T, K, D) and valid (B, W + T), query i being slot W + i.
    Returns (B, T, H, Dv) and (B, T, H, 1), float32.
    """
    B, T, H, d = q.shape
    K = k.shape[2]
    G = H // K
    q = (q.astype(mx.float32) * d**-0.5).reshape(B, T, K, G, d).transpose(0, 2, 3, 1, 4)
    k = k.astype(mx.float32).transpose(0, 2, 3, 1)
    v = v.astype(mx.float32).transpose(0, 2, 1, 3)
    # A chunk of C queries reads W + C - 1 slots: C near W wastes least.
    size = max(chunk_size, min(window, 512))
    sums, tops = [], []
    for start in range(0, T, size):
        C = min(size, T - start)
        slots = slice(start + 1, start + window + C)
        offset = mx.arange(window + C - 1) - mx.arange(C)[:, None]
        inside = (offset >= 0) & (offset < window)
        seen = (inside & valid[:, None, slots])[:, None, None]
        queries = q[..., start : start + C, :].reshape(B, K, G * C, d)
        scores = (queries @ k[..., slots]).reshape(B, K, G, C, -1)
        scores = mx.where(seen, scores, _MASKED)
        top = scores.max(axis=-1, keepdims=True)
        weights = mx.exp(scores - top).reshape(B, K, G * C, -1)
        sums.append((weights @ v[:, :, slots]).reshape(B, K, G, C, -1))
        tops.append(top)
    total, top = (
        mx.concatenate(x, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, H, -1)
        for x in (sums, tops)
    )
    return total, top


@mx.compile
def _join(
    near: mx.array,
    total: mx.array,
    top: mx.array,
    far: mx.array,
    mass: mx.array,
    log_far_gain: mx.array,
    log_sink: mx.array,
) -> mx.array:
    """One normalised output of both parts, each (..., Dv), and their sums (..., 1).

    The near part is scaled by exp(-top); the far part joins through the logarithm of its sum,
    so that neither over- nor underflows.
    """
    average, log_far, sink = _far_part(far, mass, log_far_gain, log_sink)
    shift = mx.maximum(mx.maximum(top, log_far), sink)
    near_scale, far_weight = mx.exp(top - shift), mx.exp(log_far - shift)
    sums = total * near_scale + far_weight + mx.exp(sink - shift)
    return (near * near_scale + average * far_weight) / sums


# --- small pieces ---------------------------------------------------------------------------


def _valid_last(mask: mx.array) -> mx.array:
    """(B, S) indices that bring the valid slots to the right, otherwise in order."""
    S = mask.shape[1]
    return mx.argsort(mask.astype(mx.int32) * S + mx.arange(S), axis=1)


def _take(x: mx.array, indices: mx.array) -> mx.array:
    return mx.take_along_axis(x, indices[:, :, None, None], axis=1)
