"""Which tokens form a chunk, which chunks a segment, and where a sequence begins and ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# With heads of 64 channels the weights inside a chunk then cost what its state costs.
CHUNK = 64
# Tokens times query heads worked on at once: the buffers of a segment stay in the caches.
SEGMENT_ROWS = 9216


@dataclass(frozen=True)
class Segment:
    """``chunks`` chunks of ``size`` tokens each from slot ``start`` on, worked on at once."""

    start: int
    first_chunk: int
    chunks: int
    size: int

    @property
    def slots(self) -> slice:
        return slice(self.start, self.start + self.chunks * self.size)


@dataclass(frozen=True)
class ChunkLayout:
    """Tokens in slots, so that every sequence begins a chunk.

    A batch of rows has a slot for each token, and its last chunk may be shorter; all rows begin
    with chunk 0. Packed sequences are filled up to whole chunks, ``places`` (T,) then holds each
    token's slot. ``starts`` and ``ends`` name the sequences that begin or end with a chunk.
    """

    slots: int
    segments: tuple[Segment, ...]
    starts: Mapping[int, slice]
    ends: Mapping[int, slice]
    places: Tensor | None

    @staticmethod
    def rows(tokens: int, segment_chunks: int) -> ChunkLayout:
        """Sequences of equal length, one a row."""
        whole, rest = divmod(tokens, CHUNK)
        segments = _segments(whole, segment_chunks)
        if rest:
            segments.append(Segment(whole * CHUNK, whole, 1, rest))
        last = segments[-1].first_chunk + segments[-1].chunks - 1
        everything = slice(None)
        return ChunkLayout(tokens, tuple(segments), {0: everything}, {last: everything}, None)

    @staticmethod
    def packed(cu_seqlens: Tensor, tokens: int, segment_chunks: int) -> ChunkLayout:
        """Sequences packed in one row; raises ValueError unless they are all of its tokens."""
        borders = cu_seqlens.long()
        lengths = borders.diff()
        if borders[0] != 0 or borders[-1] != tokens or (lengths < 0).any():
            raise ValueError(f"cu_seqlens must rise from 0 to {tokens}, not {borders.tolist()}")
        chunks = (lengths + CHUNK - 1) // CHUNK
        first = chunks.cumsum(0) - chunks
        shift = (first * CHUNK - borders[:-1]).repeat_interleave(lengths)
        starts, ends = {}, {}
        for row, (begin, count) in enumerate(zip(first.tolist(), chunks.tolist(), strict=True)):
            if count:
                starts[begin] = ends[begin + count - 1] = slice(row, row + 1)
        total = int(chunks.sum())
        places = torch.arange(tokens, device=cu_seqlens.device) + shift
        segments = tuple(_segments(total, segment_chunks))
        return ChunkLayout(total * CHUNK, segments, starts, ends, places)

    def spread(self, x: Tensor) -> Tensor:
        """Tokens (B, T, ...) -> slots (B, S, ...), zeros where a slot has no token."""
        if self.places is None:
            return x
        out = x.new_zeros(1, self.slots, *x.shape[2:])
        return out.index_copy_(1, self.places, x)

    def empty_slots(self, out: Tensor) -> Tensor:
        """Where to put the slots of out (B, T, ...): out itself if they are its tokens."""
        if self.places is None:
            return out
        return out.new_empty(1, self.slots, *out.shape[2:])

    def gather(self, slots: Tensor, out: Tensor) -> None:
        """Slots (B, S, ...), as :meth:`empty_slots` made them, to tokens (B, T, ...)."""
        if self.places is not None:
            torch.index_select(slots, 1, self.places, out=out)

    def valid(self, mask: Tensor | None) -> Tensor | None:
        """Which slots hold a token that writes and decays, (B, S) bool; None for all."""
        if mask is None and self.places is not None:
            mask = torch.ones(1, len(self.places), dtype=torch.bool, device=self.places.device)
        return None if mask is None else self.spread(mask)


def segment_chunks(batch: int, heads: int) -> int:
    """How many chunks are worked on at once."""
    return max(1, SEGMENT_ROWS // (CHUNK * batch * heads))


def most_segments(tokens: int, per_segment: int, sequences: int | None) -> int:
    """The segments of any ChunkLayout of so many tokens; ``sequences`` where they are packed."""
    if sequences is None:
        whole, rest = tokens // CHUNK, tokens % CHUNK
        return -(-whole // per_segment) + (1 if rest else 0)
    return -(-(tokens // CHUNK + sequences) // per_segment)


def _segments(chunks: int, per_segment: int) -> list[Segment]:
    return [
        Segment(first * CHUNK, first, min(per_segment, chunks - first), CHUNK)
        for first in range(0, chunks, per_segment)
    ]
