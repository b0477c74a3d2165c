"""Softmax over a window with sinks: its state holds their keys, values and positions.

Shapes: x (B, T, D); q (B, T, H, d), k (B, T, K, d) and v (B, T, K, Dv).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from supra_core.mixers.base import ModelFields
from supra_core.mixers.window import WindowAttention
from supra_torch.model.layers import Positions
from supra_torch.model.mixers.base import LayerState
from supra_torch.model.mixers.softmax import SoftmaxMixer
from supra_torch.model.visibility import Seen, seen_keys

if TYPE_CHECKING:
    from supra_torch.model.context_parallel import Before


@dataclass(frozen=True)
class SeenWithSinks(Seen):
    """As :class:`Seen`; the first ``sinks`` tokens of a document are seen from everywhere in it."""

    sinks: int = 0

    def first_key(self, slot: int, window: int | None) -> int:
        """Sinks may stand anywhere before."""
        return 0

    def mask(self, queries: slice, keys: slice, window: int | None) -> Tensor:
        """Which of these keys each of these queries sees: (B, 1, T, S) bool."""
        near = super().mask(queries, keys, window)
        sinks = (self.key_places[:, None, keys] < self.sinks)[:, None]
        return near | (super().mask(queries, keys, None) & sinks)


class WindowMixer(SoftmaxMixer):
    """Softmax attention to the sinks and a window, which alone its state then holds."""

    def __init__(self, spec: ModelFields, mixer: WindowAttention) -> None:
        super().__init__(spec, mixer)  # type: ignore[arg-type]
        self.window: int
        self.sinks = mixer.sinks

    def sight(
        self, B: int, T: int, positions: Positions, state: LayerState | None, mask: Tensor | None
    ) -> SeenWithSinks:
        seen = seen_keys(B, T, positions, state, mask)
        return SeenWithSinks(**vars(seen), sinks=self.sinks)

    def kept(self, memory: LayerState, padded: bool) -> LayerState:
        """Of every row the window's tokens in order, then the sinks."""
        valid, places = memory["valid"], memory["positions"]
        rank = valid.byte() + (valid & (places < self.sinks)).byte()
        order = rank.argsort(dim=1, stable=True)[:, -(self.sinks + self.window - 1) :]
        return {
            name: x.take_along_dim(order.view(*order.shape, *[1] * (x.ndim - 2)), dim=1)
            for name, x in memory.items()
        }

    def _shared(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, before: Before
    ) -> Tensor:
        """The heads' output (B, T, H, Dv) for a part of rows, of which others have the rest."""
        B, H, part = len(q), q.shape[2], before.part
        everywhere = replace(positions, positions=before.places, documents=before.documents)
        seen = self.sight(B, before.places.shape[1], everywhere, None, None)
        q, k, v = (part.by_heads(x, of=H) for x in (q, k, v))
        return part.by_tokens(self._attended(q, k, v, seen, self.window), H)

    def with_room(self, state: LayerState, rows: int, seen: int, length: int) -> LayerState:
        """Keys and values (1, n, K, d) as (rows, K, length, d), each token in its own slot."""
        valid = state["valid"][0]
        slots, roomy = state["positions"][0, valid], {}
        for name in ("keys", "values"):
            prefix = state[name][:, valid].transpose(1, 2)
            room = prefix.new_zeros(rows, prefix.shape[1], length, prefix.shape[3])
            room[:, :, slots] = prefix
            roomy[name] = room
        return roomy

    def in_view(self, x: Tensor, seen: int) -> Tensor:
        first = max(0, seen + 1 - self.window)
        return torch.cat([x[:, :, : min(self.sinks, first)], x[:, :, first : seen + 1]], dim=2)
