"""Linear attention in MLX: chunked prefill and the decode step.

Everything is computed and kept in float32. Only powers gamma^n with n >= 0 are formed, so that no
decay and no length overflows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import mlx.core as mx

from supra_mlx.metal import metal_enabled, metal_recurrence


def linear_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    *,
    initial_state: mx.array | None = None,
    mask: mx.array | None = None,
    normaliser: Literal["sum"] | None = None,
    sink: mx.array | None = None,
    chunk_size: int = 64,
) -> tuple[mx.array, mx.array]:
    """Causal linear attention with decay: o_t = q_t S_t, S_t = gamma S_{t-1} + k_t^T v_t.

    q (B, T, H, Dk); k (B, T, K, Dk) and v (B, T, K, Dv), query head h using key/value head
    h // (H / K); decay (H,), gamma in (0, 1]; initial_state (B, H, Dk, Dv), zeros when None;
    mask (B, T) bool: a False token neither writes nor decays. With ``normaliser="sum"`` the
    output is divided by q_t . z_t, plus ``sink`` (H,) >= 0 if there is one, and z is the last
    column of the state (B, H, Dk, Dv + 1).

    Returns the output (B, T, H, Dv) in q's type and the final state in float32. Memory is
    linear in T. Raises ValueError when the shapes do not fit together.
    """
    _check(q, k, v, decay, initial_state, mask, normaliser)
    if sink is not None and normaliser != "sum":
        raise ValueError("a sink is added to the sum: it needs normaliser='sum'")
    if normaliser == "sum":
        v = with_ones(v)
    output, state = weighted_sum(q, k, v, decay, initial_state, mask, chunk_size)
    if normaliser == "sum":
        output = _divide(output, sink)
    return output.astype(q.dtype), state


# --- the linear part ------------------------------------------------------------------------


def weighted_sum(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    initial_state: mx.array | None,
    mask: mx.array | None,
    chunk_size: int,
) -> tuple[mx.array, mx.array]:
    """The operator without its normaliser: (B, T, H, Dv) and (B, H, Dk, Dv), float32."""
    B, T, H, Dk = q.shape
    K, Dv = v.shape[2:]
    if T == 1 and metal_enabled():
        before = mx.zeros((B, H, Dk, Dv)) if initial_state is None else initial_state
        return metal_recurrence(q, k, v, decay, before, mask)
    G = H // K
    # Heads of a group share a dimension, so that k and v are never repeated in memory.
    q = q.astype(mx.float32).reshape(B, T, K, G, Dk).transpose(0, 2, 3, 1, 4)
    k, v = (x.astype(mx.float32).transpose(0, 2, 1, 3) for x in (k, v))
    if initial_state is None:
        state = mx.zeros((B, K, G, Dk, Dv))
    else:
        state = initial_state.astype(mx.float32).reshape(B, K, G, Dk, Dv)
    decay = decay.astype(mx.float32).reshape(K, G)
    if T == 0:
        output = mx.zeros((B, K, G, 0, Dv))
    elif T == 1:
        output, state = _step(q, k, v, decay, state, mask)
    else:
        output, state = _chunks(q, k, v, decay, state, mask, chunk_size)
    output = output.transpose(0, 3, 1, 2, 4).reshape(B, T, H, Dv)
    return output, state.reshape(B, H, Dk, Dv)


def _step(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    state: mx.array,
    mask: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """One token: q (B, K, G, 1, Dk), k and v (B, K, 1, D), state (B, K, G, Dk, Dv)."""
    written = written_state(
        state, decay[..., None, None], k[:, :, None].swapaxes(-1, -2), v[:, :, None]
    )
    if mask is not None:
        written = mx.where(mask.reshape(-1, 1, 1, 1, 1), written, state)
    return q @ written, written


def written_state(state: mx.array, decay: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """gamma S + k^T v, S (..., Dk, Dv): k (..., Dk, 1), v (..., 1, Dv).

    A product that adds to S takes half the time of one compiled pass, whose broadcasts a CPU
    computes element by element.
    """
    shape = state.shape[:-2]
    k, v = (mx.broadcast_to(x, (*shape, *x.shape[-2:])) for x in (k, v))
    return mx.addmm(decay * state, k, v)


class _Weights(NamedTuple):
    """Powers of the decay in one chunk of C tokens, b being B or, without a mask, 1."""

    within: mx.array  # (b, K, G, C, C): from token j to token i, 0 where i must not see j
    entering: mx.array  # (b, K, G, C, 1): from the chunk's start to token i
    leaving: mx.array  # (b, K, G, 1, C): from token j to the chunk's end
    across: mx.array  # (b, K, G, 1, 1): over the whole chunk


def _powers(decay: mx.array, count: int) -> mx.array:
    """decay (K, G) -> gamma^0 ... gamma^(count - 1), (K, G, count).

    Doubling multiplies log2(count) times; an exponential would round more (MLX's is wrong by
    9e-7 on a CPU), and differently from the decode step.
    """
    powers, factor = mx.ones_like(decay)[..., None], decay[..., None]
    while powers.shape[-1] < count:
        powers = mx.concatenate([powers, powers * factor], axis=-1)
        factor = factor * factor
    return powers[..., :count]


def _chunk_weights(powers: mx.array, valid: mx.array) -> _Weights:
    """powers (K, G, at least C + 1), valid (b, C)."""
    C = valid.shape[1]
    age = mx.cumsum(valid.astype(mx.int32), axis=1)  # valid tokens up to and including i
    seen = mx.tril(mx.ones((C, C), dtype=mx.bool_)) & valid[:, None, :]

    def decayed(steps: mx.array) -> mx.array:
        """steps (b, ...) -> (b, K, G, ...)."""
        return mx.moveaxis(powers[:, :, steps], 2, 0)

    return _Weights(
        within=mx.where(
            seen[:, None, None], decayed(mx.maximum(age[:, :, None] - age[:, None, :], 0)), 0.0
        ),
        entering=decayed(age[:, :, None]),
        leaving=mx.where(
            valid[:, None, None, None, :], decayed((age[:, -1:] - age)[:, None, :]), 0.0
        ),
        across=decayed(age[:, -1:, None]),
    )


def _chunks(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    state: mx.array,
    mask: mx.array | None,
    chunk_size: int,
) -> tuple[mx.array, mx.array]:
    """Matmuls inside a chunk, the state between chunks. Shapes as in :func:`_step`."""
    B, K, G, T, Dk = q.shape
    powers = _powers(decay, min(chunk_size, T) + 1)
    known: dict[int, _Weights] = {}
    outputs = []
    for start in range(0, T, chunk_size):
        stop = min(start + chunk_size, T)
        C = stop - start
        if mask is not None:
            weights = _chunk_weights(powers, mask[:, start:stop])
        else:
            if C not in known:
                known[C] = _chunk_weights(powers, mx.ones((1, C), dtype=mx.bool_))
            weights = known[C]
        queries, keys, values = q[..., start:stop, :], k[:, :, start:stop], v[:, :, start:stop]
        transposed = keys.swapaxes(-1, -2)
        scores = (queries.reshape(B, K, G * C, Dk) @ transposed).reshape(B, K, G, C, C)
        inside = (scores * weights.within).reshape(B, K, G * C, C) @ values
        before = (queries * weights.entering) @ state
        outputs.append(inside.reshape(B, K, G, C, -1) + before)
        written = (transposed[:, :, None] * weights.leaving) @ values[:, :, None]
        state = weights.across * state + written
    return mx.concatenate(outputs, axis=3), state


# --- small pieces ---------------------------------------------------------------------------


def with_ones(v: mx.array) -> mx.array:
    """A column of ones after the values, whose weighted sum is the sum of the weights."""
    return mx.concatenate([v, mx.ones_like(v[..., :1])], axis=-1)


def _divide(output: mx.array, sink: mx.array | None) -> mx.array:
    """Divide by the last column plus the sink; nothing written yet is 0 / 0 and becomes 0."""
    added = mx.array(0.0) if sink is None else sink[:, None]
    return _quotient(output[..., :-1], output[..., -1:], added)


@mx.compile
def _quotient(sums: mx.array, total: mx.array, sink: mx.array) -> mx.array:
    total = total + sink
    return sums / mx.where(total == 0.0, 1.0, total)


def _check(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    initial_state: mx.array | None,
    mask: mx.array | None,
    normaliser: str | None,
) -> None:
    B, T, H, Dk = q.shape
    if k.shape[:2] != (B, T) or v.shape[:3] != k.shape[:3] or k.shape[3] != Dk or H % k.shape[2]:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit together")
    if decay.shape != (H,):
        raise ValueError(f"decay must have shape ({H},), not {decay.shape}")
    if normaliser not in (None, "sum"):
        raise ValueError(f"normaliser must be 'sum' or None, not {normaliser!r}")
    expected = (B, H, Dk, v.shape[3] + (normaliser == "sum"))
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must be {expected}, not {initial_state.shape}")
    if mask is not None and mask.shape != (B, T):
        raise ValueError(f"mask must be {(B, T)}, not {mask.shape}")
