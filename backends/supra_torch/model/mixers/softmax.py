"""Softmax attention: its state holds keys, values and which of them are tokens.

Shapes: x (B, T, D); q (B, T, H, d), k (B, T, K, d) and v (B, T, K, Dv).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from supra_core.mixers.base import ModelFields
from supra_core.mixers.softmax import SoftmaxAttention
from supra_torch.model.layers import Positions
from supra_torch.model.mixers.base import LayerState, MixerModule, continued, last_tokens
from supra_torch.model.visibility import Seen, seen_keys
from supra_torch.ops.target import kind

if TYPE_CHECKING:
    from supra_torch.model.context_parallel import Before

# Queries whose mask is in memory at once.
_QUERIES = 4096


class SoftmaxMixer(MixerModule):
    """Over all earlier tokens, or a window, whose tokens alone its state then holds."""

    mixer: SoftmaxAttention

    def __init__(self, spec: ModelFields, mixer: SoftmaxAttention) -> None:
        super().__init__(spec, mixer, spec.head_dim, spec.attention_bias != "none")
        self.window, self.rotary = mixer.window, mixer.rotary
        self.softcap = spec.attention_softcap

    def rotated(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """x (B, T, D) -> q (B, T, H, d) and k (B, T, K, d), as the scores take them."""
        q, k = (positions.rotate(z, self.rotary) for z in self.queries_and_keys(x))
        return q, k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Attention of q (B, H, T, d) to k, v (B, K, S, ·): (B, H, T, Dv).

        mask (T, S) or (B, 1, T, S) bool, None for all keys or, if ``causal``, those up to a
        query's own, S being T.
        """
        group = q.shape[1] // k.shape[1]
        # On a GPU what takes a mask takes no groups, or everything is computed at full length.
        if self.softcap is not None or (mask is not None and kind(q) == "cuda"):
            k, v = (z.repeat_interleave(group, dim=1) for z in (k, v))
        if self.softcap is None:
            grouped = k.shape[1] < q.shape[1]
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
            )
        scores = q @ k.mT / (q.shape[-1] ** 0.5 * self.softcap)
        scores = self.softcap * torch.tanh(scores.float())
        if causal:
            mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v

    def heads_output(
        self, x: Tensor, positions: Positions, state: LayerState | None, mask: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        (q, k), v = self.rotated(x, positions), self.values(x)
        state = continued(state, positions)
        B, T = x.shape[:2]
        if positions.before is not None:
            assert state is None and mask is None
            out = self._shared(q, k, v, positions, positions.before)
            return out, {}
        alike = state is None and mask is None and positions.documents is None
        seen = None
        if not alike or (self.window is not None and self.window < T):
            seen = self.sight(B, T, positions, state, mask)
        memory = self._remember(k, v, positions, state, mask)
        if state is not None:
            k, v = (torch.cat([state[name], x], dim=1) for name, x in (("keys", k), ("values", v)))
        return self._attended(q, k, v, seen, self.window), memory

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, seen: Seen | None, window: int | None
    ) -> Tensor:
        """Attention of q (B, T, H, d) to k, v (B, S, K, .): (B, T, H, Dv).

        ``seen`` None: of every query to all keys up to its own, S being T. Else some queries at a
        time, since a mask of all pairs would grow with the square of T.
        """
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        if seen is None:
            return self.attend(q, k, v, None, causal=True).transpose(1, 2)
        T, S = q.shape[2], k.shape[2]
        found = []
        for first in range(0, T, _QUERIES):
            queries = slice(first, min(first + _QUERIES, T))
            keys = slice(seen.first_key(S - T + first, window), S - T + queries.stop)
            mask = seen.mask(queries, keys, window)
            found.append(self.attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], mask, False))
        return (found[0] if len(found) == 1 else torch.cat(found, dim=2)).transpose(1, 2)

    def _shared(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Positions, before: Before
    ) -> Tensor:
        """The heads' output (B, T, H, Dv) for a part of rows, of which others have the rest."""
        (B, T, H), part, seen = q.shape[:3], before.part, None
        whole, documents = before.places.shape[1], before.documents
        if self.window is None or self.window >= whole:
            k, v = (part.by_heads(x, of=H) for x in (k, v))
            if documents is not None:
                everywhere = replace(positions, positions=before.places, documents=documents)
                seen = seen_keys(B, whole, everywhere, None, None)
            out = self._attended(part.by_heads(q, of=H), k, v, seen, None)
            return part.by_tokens(out, H)
        slots = min(self.window - 1, whole - T)
        k, v = (torch.cat([before.last(x, slots), x], dim=1) for x in (k, v))
        state = {"valid": before.valid(slots), "positions": before.positions(slots)}
        return self._attended(q, k, v, seen_keys(B, T, positions, state, None), self.window)

    def _remember(
        self,
        k: Tensor,
        v: Tensor,
        positions: Positions,
        state: LayerState | None,
        mask: Tensor | None,
    ) -> LayerState:
        B, T = k.shape[:2]
        valid = torch.ones(B, T, dtype=torch.bool, device=k.device) if mask is None else mask
        if positions.documents is not None:
            own = positions.documents
            valid = own == own[:, -1:]
            if state is not None:
                still = own[:, :1] == own[:, -1:]
                state = {**state, "valid": state["valid"] & still}
        place = positions.positions.expand(B, T)
        memory = {"keys": k, "values": v, "valid": valid, "positions": place}
        if state is not None:
            memory = {name: torch.cat([state[name], x], dim=1) for name, x in memory.items()}
        return self.kept(memory, mask is not None)

    def sight(
        self, B: int, T: int, positions: Positions, state: LayerState | None, mask: Tensor | None
    ) -> Seen:
        """What decides which keys each of T queries sees, those of ``state`` before their own."""
        return seen_keys(B, T, positions, state, mask)

    def kept(self, memory: LayerState, padded: bool) -> LayerState:
        """What a later token may see; ``padded``: padding may stand among the tokens."""
        return memory if self.window is None else last_tokens(memory, self.window - 1, padded)

    def with_room(self, state: LayerState, rows: int, seen: int, length: int) -> LayerState:
        """Keys and values (1, T, K, d) as (rows, K, length, d), the last in slot ``seen`` - 1."""
        roomy = {}
        for name in ("keys", "values"):
            prefix = state[name].transpose(1, 2)
            room = prefix.new_empty(rows, prefix.shape[1], length, prefix.shape[3])
            room[:, :, seen - prefix.shape[2] : seen] = prefix
            roomy[name] = room
        return roomy

    def step_in_room(
        self, x: Tensor, positions: Positions, state: LayerState, seen: int
    ) -> tuple[Tensor, LayerState]:
        q, k = (z[:, 0] for z in self.rotated(x, positions))
        keys, values = state["keys"], state["values"]
        keys[:, :, seen], values[:, :, seen] = k, self.values(x)[:, 0]
        near_keys, near_values = self.in_view(keys, seen), self.in_view(values, seen)
        # The queries of a group stand beside each other, where attention has its sequence.
        grouped = q.unflatten(1, (keys.shape[1], -1))
        out = self.attend(grouped, near_keys, near_values, None, causal=False)
        return self.o_proj(out.flatten(1))[:, None], state

    def in_view(self, x: Tensor, seen: int) -> Tensor:
        """Of keys or values (n, K, length, d) those that the token after ``seen`` others sees."""
        first = 0 if self.window is None else max(0, seen + 1 - self.window)
        return x[:, :, first : seen + 1]

    def keep_rows(self, state: LayerState, rows: Tensor, seen: int) -> LayerState:
        for x in state.values():
            # In place, a row after the other: none is read after it is written.
            for place, row in enumerate(rows.tolist()):
                if place != row:
                    x[place, :, :seen] = x[row, :, :seen]
        return {name: x[: len(rows)] for name, x in state.items()}
