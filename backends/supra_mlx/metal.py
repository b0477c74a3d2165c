"""The recurrence of linear attention as one Metal kernel.

Nobody has run it on a Mac yet: it is off unless the environment has SUPRA_METAL=1, and ``supra
doctor --deep`` compares it with the operations it replaces. The tests run its very source as C++.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import mlx.core as mx

METAL_VARIABLE = "SUPRA_METAL"

# A threadgroup has 32 columns of one head's state, and this many threads for each of them, which
# share its rows.
METAL_ROWS = 8
METAL_COLUMNS = 32

# q (B, T, H, Dk), k (B, T, K, Dk), v (B, T, K, Dv), decay (H,), state (B, H, Dk, Dv), mask (B, T),
# out (B, T, H, Dv), state_out like state; all float32 but mask, and contiguous.
METAL_SOURCE = """
    const uint column = thread_position_in_grid.x;
    const uint head = thread_position_in_grid.z;
    const uint lane = thread_position_in_threadgroup.x;
    const uint group = thread_position_in_threadgroup.y;
    const uint b = head / H;
    const uint h = head % H;
    const uint kv = h / (H / K);
    const uint T = q_shape[1];
    const bool inside = column < Dv;
    const float gamma = decay[h];
    threadgroup float partial[ROWS][COLUMNS];

    float kept[(Dk + ROWS - 1) / ROWS];
    for (uint j = 0, i = group; i < Dk; ++j, i += ROWS) {
        kept[j] = inside ? state[(head * Dk + i) * Dv + column] : 0.0f;
    }
    for (uint t = 0; t < T; ++t) {
        const uint token = b * T + t;
        const uint place = (token * H + h) * Dv + column;
        if (MASKED && !mask[token]) {
            if (group == 0 && inside) { out[place] = 0.0f; }
            continue;
        }
        const float value = inside ? v[(token * K + kv) * Dv + column] : 0.0f;
        float sum = 0.0f;
        for (uint j = 0, i = group; i < Dk; ++j, i += ROWS) {
            kept[j] = gamma * kept[j] + k[(token * K + kv) * Dk + i] * value;
            sum += q[(token * H + h) * Dk + i] * kept[j];
        }
        partial[group][lane] = sum;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (group == 0 && inside) {
            float total = 0.0f;
            for (uint row = 0; row < ROWS; ++row) { total += partial[row][lane]; }
            out[place] = total;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    for (uint j = 0, i = group; i < Dk; ++j, i += ROWS) {
        if (inside) { state_out[(head * Dk + i) * Dv + column] = kept[j]; }
    }
"""
METAL_INPUTS = ("q", "k", "v", "decay", "state", "mask")
METAL_OUTPUTS = ("out", "state_out")


def metal_available() -> bool:
    """Whether there is a GPU that Metal kernels run on."""
    return bool(mx.metal.is_available()) and mx.default_device() == mx.gpu


def metal_enabled() -> bool:
    """Whether decode steps are to use the kernel."""
    return os.environ.get(METAL_VARIABLE) == "1" and metal_available()


def metal_recurrence(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    state: mx.array,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """o_t = q_t S_t, S_t = gamma S_{t-1} + k_t^T v_t, one token after the other, in float32.

    q (B, T, H, Dk); k (B, T, K, Dk); v (B, T, K, Dv); decay (H,); state (B, H, Dk, Dv); mask
    (B, T) bool: a False token neither writes nor decays. Returns the outputs (B, T, H, Dv) and
    the state after the last token. It has no gradient.
    """
    B, T, H, Dk = q.shape
    K, Dv = v.shape[2:]
    sizes = {"H": H, "K": K, "Dk": Dk, "Dv": Dv, "ROWS": METAL_ROWS, "COLUMNS": METAL_COLUMNS}
    floats = [x.astype(mx.float32) for x in (q, k, v, decay, state)]
    # An input has to be there, though an unmasked kernel reads none of it.
    masked = mx.ones((1,), dtype=mx.bool_) if mask is None else mask
    outputs: list[mx.array] = _recurrence_kernel()(
        inputs=[*floats, masked],
        template=[*sizes.items(), ("MASKED", mask is not None)],
        grid=(-(-Dv // METAL_COLUMNS) * METAL_COLUMNS, METAL_ROWS, B * H),
        threadgroup=(METAL_COLUMNS, METAL_ROWS, 1),
        output_shapes=[(B, T, H, Dv), state.shape],
        output_dtypes=[mx.float32, mx.float32],
    )
    return outputs[0], outputs[1]


@cache
def _recurrence_kernel() -> Any:
    return mx.fast.metal_kernel(
        name="supra_recurrence",
        input_names=list(METAL_INPUTS),
        output_names=list(METAL_OUTPUTS),
        source=METAL_SOURCE,
    )
