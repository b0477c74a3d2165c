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
from supra_torch.model.mixers.base import LayerState, continued
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
        # The base remembers everything, of which this keeps what may still be seen.
        self.window, self.reach, self.sinks = None, mixer.window, mixer.sinks

    def heads_output(
        self, x: Tensor, positions: Positions, state: LayerState | None, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        (q, k), v = self.rotated(x, positions), self.values(x)
        state = continued(state, positions)
        B, T = x.shape[:2]
        if positions.before is not None:
            assert state is None and mask is None
            return self._shared(q, k, v, positions, positions.before), {}
        alike = state is None and mask is None and positions.documents is None
        seen = None if alike and self.reach >= T else self._seen(B, T, positions, state, mask)
        memory = self._remember(k, v, positions, state, mask)
        if state is not None:
            k, v = (torch.cat([state[name], x], dim=1) for name, x in (("keys", k), ("values", v)))
        return self._attended(q, k, v, seen, self.reach), self._visible(memory)

    def _seen(
        self, B: int, T: int, positions: Positions, state: LayerState | None, mask: Tensor | None
    ) -> SeenWithSinks:
        return SeenWithSinks(**vars(seen_keys(B, T, positions, state, mask)), sinks=self.sinks)

    def _visible(self, memory: LayerState) -> LayerState:
        """Of every row the tokens that the next one may see: the window's in order, then sinks."""
        valid, places = memory["valid"], memory["positions"]
        rank = valid.byte() + (valid & (places < self.sinks)).byte()
        order = rank.argsort(dim=1, stable=True)[:, -(self.sinks + self.reach - 1) :]
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
        seen = self._seen(B, before.places.shape[1], everywhere, None, None)
        q, k, v = (part.by_heads(x, of=H) for x in (q, k, v))
        return part.by_tokens(self._attended(q, k, v, seen, self.reach), H)

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
        first = max(0, seen + 1 - self.reach)
        return torch.cat([x[:, :, : min(self.sinks, first)], x[:, :, first : seen + 1]], dim=2)
