"""How the Triton kernel is cut for each head size and architecture: a table, no autotuning.

To extend it, add a row to ``_TABLE`` under a compute capability (90 is sm_90), then run
``python -m supra_torch.benchmark.resources``: it compiles every row ahead of time, without a
GPU, and prints registers, spills and shared memory; ``supra bench op`` gives the times. A
capability without rows of its own uses the next lower one's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Tiles:
    """Tokens a chunk, value columns a program, warps a program, and stages of the load pipeline."""

    block_t: int
    block_v: int
    warps: int
    stages: int


class _Key(NamedTuple):
    capability: int
    """Compute capability times ten."""
    element_bytes: int
    rows: int
    """Rows of the state: the query role's head size, rounded up to a power of two."""


_SMALL = {
    (2, 32): Tiles(32, 32, 4, 2),
    (2, 64): Tiles(32, 32, 4, 2),
    (2, 128): Tiles(32, 32, 8, 2),
    (2, 256): Tiles(32, 32, 8, 2),
    (4, 32): Tiles(16, 32, 4, 2),
    (4, 64): Tiles(16, 32, 4, 2),
    (4, 128): Tiles(16, 32, 8, 2),
    (4, 256): Tiles(16, 16, 8, 1),
}
_HOPPER = _SMALL | {
    (2, 32): Tiles(64, 32, 4, 2),
    (2, 64): Tiles(32, 64, 4, 2),
    (2, 128): Tiles(32, 64, 8, 2),
}

_TABLE: dict[_Key, Tiles] = {
    _Key(capability, *key): tiles
    for capability, rows in ((80, _SMALL), (90, _HOPPER), (100, _SMALL), (120, _SMALL))
    for key, tiles in rows.items()
}
"""Chosen so that nothing spills at d <= 128; not yet by measured times."""

_MASKED = {
    _Key(90, 2, 32): Tiles(64, 32, 4, 1),
    _Key(90, 2, 64): Tiles(32, 64, 8, 1),
    _Key(90, 2, 128): Tiles(16, 32, 8, 1),
    _Key(100, 2, 128): Tiles(32, 32, 8, 1),
    _Key(120, 2, 128): Tiles(32, 32, 8, 1),
}
"""Rows with a mask or packed sequences, where those of the table spill up to 100 bytes."""

_SMALLEST_BLOCK = 16
"""A tensor core's side."""

_LONGEST_SEGMENTATION = 16
"""Each program reads the states of all segments before its own."""

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes a program may have, by compute capability times ten (CUDA C++ guide, table of limits)."""

CAPABILITIES = tuple(SHARED_MEMORY)
"""Architectures that the table is compiled for in the tests."""


def block_of(channels: int) -> int:
    """The power of two that holds ``channels``, at least a tensor core's side."""
    return max(_SMALLEST_BLOCK, 1 << (channels - 1).bit_length())


def tiles_for(
    capability: int, element_bytes: int, rows: int, columns: int, masked: bool = False
) -> Tiles:
    """The row for a state of ``rows`` x ``columns``, its value block no wider than the columns.

    ``masked``: with a mask or packed sequences.

    Raises ValueError for an architecture older than every row.
    """
    block = max(32, block_of(rows))
    known = [key for key in _TABLE if key.element_bytes == element_bytes and key.rows == block]
    fitting = [key for key in known if key.capability <= capability]
    if not fitting:
        raise ValueError(
            f"there is no Triton kernel for compute capability {capability / 10:.1f}: "
            "use implementation='chunked'"
        )
    key = max(fitting)
    tiles = _MASKED.get(key, _TABLE[key]) if masked else _TABLE[key]
    return Tiles(tiles.block_t, min(tiles.block_v, block_of(columns)), tiles.warps, tiles.stages)


def segments_for(programs: int, tokens: int, block_t: int, processors: int) -> tuple[int, int]:
    """Into how many segments, and of how many tokens, to cut sequences of ``tokens``.

    One unless ``programs`` leave half of two programs a processor empty; a segment is at least
    eight chunks, so that reading the states between them stays cheap.
    """
    wanted = min(_LONGEST_SEGMENTATION, 2 * processors // max(1, programs))
    chunks = -(-tokens // block_t)
    count = max(1, min(wanted, chunks // 8))
    length = -(-chunks // count) * block_t
    return -(-tokens // length), length
