"""The decode step as one Triton kernel: the state is read once and written once.

A program owns one head of one sequence and a block of its value columns. With the normaliser it
owns all columns, because each needs q . z, and z, a column of the same state, is overwritten.
Tested in Triton's interpreter and compiled ahead of time; unmeasured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of the state a program holds at once: 32 registers a thread at 8 warps.
_TILE = 8192
_NUM_WARPS = 8
# 32 float32 columns are one 128-byte line.
_SPLIT_COLUMNS, _WHOLE_COLUMNS = 32, 128


@triton.jit
def _lost_share(slope):
    """1 - exp(-slope) with full relative precision: a series where the difference cancels."""
    series = slope * (1 - slope / 2 * (1 - slope / 3 * (1 - slope / 4 * (1 - slope / 5))))
    return tl.where(slope < 0.0625, series, 1 - tl.exp(-slope))


@triton.jit
def step_kernel(
    q,  # (B, H, DK), channels contiguous, as k (B, K, DK) and v (B, K, DV)
    k,
    v,
    slope,  # (H,) float32
    mask,  # (B,) bool, or None
    state,  # (B, H, DK, DV), with sums DV + 1 columns, float32, contiguous
    output,  # (B, H, DV), contiguous
    sums,  # (B, H) float32, or None: no normaliser
    new_state,  # as state; may be the same memory
    H,
    GROUP,
    q_batch,
    q_head,
    k_batch,
    k_head,
    v_batch,
    v_head,
    DK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
):
    """S = gamma S + k^T v and o = q S, by 1 with ``sums`` o = q S / q . z."""
    row = tl.program_id(0).to(tl.int64)
    b, h = row // H, row % H
    q += b * q_batch + h * q_head
    k += b * k_batch + (h // GROUP) * k_head
    v += b * v_batch + (h // GROUP) * v_head
    width = DV if sums is None else DV + 1
    state += row * DK * width
    new_state += row * DK * width
    lost = _lost_share(tl.load(slope + h))
    written = 1.0
    if mask is not None:
        valid = tl.load(mask + b).to(tl.float32)
        lost *= valid
        written *= valid

    share = 1.0
    if sums is not None:
        total = 0.0
        for start in range(0, DK, BLOCK_K):
            i = start + tl.arange(0, BLOCK_K)
            seen = i < DK
            query = tl.load(q + i, seen, 0.0).to(tl.float32)
            key = tl.load(k + i, seen, 0.0).to(tl.float32) * written
            z = tl.load(state + i * width + DV, seen, 0.0)
            # A narrow tile is loaded by several threads and stored by one: all loads come first.
            tl.debug_barrier()
            z = z - lost * z + key
            tl.store(new_state + i * width + DV, z, seen)
            total += tl.sum(query * z, 0)
        tl.store(sums + row, total)
        share = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))

    for block in range(COLUMN_BLOCKS):
        j = (tl.program_id(1) * COLUMN_BLOCKS + block) * BLOCK_V + tl.arange(0, BLOCK_V)
        value = tl.load(v + j, j < DV, 0.0).to(tl.float32)
        out = tl.zeros((BLOCK_V,), tl.float32)
        for start in range(0, DK, BLOCK_K):
            i = start + tl.arange(0, BLOCK_K)
            query = tl.load(q + i, i < DK, 0.0).to(tl.float32)
            key = tl.load(k + i, i < DK, 0.0).to(tl.float32) * written
            place = i[:, None] * width + j[None, :]
            seen = (i[:, None] < DK) & (j[None, :] < DV)
            tile = tl.load(state + place, seen, 0.0)
            tl.debug_barrier()
            tile = tile - lost * tile + key[:, None] * value[None, :]
            tl.store(new_state + place, tile, seen)
            out += tl.sum(query[:, None] * tile, 0)
        tl.store(output + row * DV + j, (out * share).to(output.dtype.element_ty), j < DV)


def blocks(Dk: int, Dv: int, normalise: bool) -> dict[str, int]:
    """The kernel's block sizes for one head size."""
    columns = min(triton.next_power_of_2(Dv), _WHOLE_COLUMNS if normalise else _SPLIT_COLUMNS)
    return {
        "BLOCK_K": min(triton.next_power_of_2(Dk), _TILE // columns),
        "BLOCK_V": columns,
        "COLUMN_BLOCKS": triton.cdiv(Dv, columns) if normalise else 1,
    }


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    state: Tensor,
    mask: Tensor | None,
    normalise: bool,
    new_state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output (B, H, Dv) and sums (B, H), or an empty tensor; ``new_state`` is written."""
    (B, H, Dk), (K, Dv) = q.shape, v.shape[1:]
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    output = q.new_empty(B, H, Dv)
    sums = state.new_empty((B, H) if normalise else (0,))
    chosen = blocks(Dk, Dv, normalise)
    grid = (B * H, triton.cdiv(Dv, chosen["BLOCK_V"] * chosen["COLUMN_BLOCKS"]))
    with torch.cuda.device(q.device if q.is_cuda else -1):
        step_kernel[grid](
            q, k, v, slope.contiguous(), mask, state, output, sums if normalise else None,
            new_state, H, H // K, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            v.stride(0), v.stride(1), DK=Dk, DV=Dv, **chosen, num_warps=_NUM_WARPS,
        )  # fmt: skip
    return output, sums
