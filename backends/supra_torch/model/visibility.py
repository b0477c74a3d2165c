"""Which keys of softmax attention a query sees, of padded rows, packed ones and windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from supra_torch.model.layers import Positions


@dataclass(frozen=True)
class Seen:
    """What decides which keys a query sees beside their order, S keys up to T queries' own.

    ``valid`` (B, S) bool; ``places`` (B, T) and ``key_places`` (B, S), their positions;
    ``documents`` and ``key_documents`` of packed rows alike; ``contiguous``: no padding stands
    between the keys.
    """

    valid: Tensor
    places: Tensor
    key_places: Tensor
    documents: Tensor | None
    key_documents: Tensor | None
    contiguous: bool

    def first_key(self, slot: int, window: int | None) -> int:
        """The first key that a query in the place of this one may see."""
        return max(0, slot - window + 1) if window is not None and self.contiguous else 0

    def mask(self, queries: slice, keys: slice, window: int | None) -> Tensor:
        """Which of these keys each of these queries sees: (B, 1, T, S) bool."""
        device, before = self.valid.device, self.valid.shape[1] - self.places.shape[1]
        own = torch.arange(before + queries.start, before + queries.stop, device=device)[:, None]
        slots = torch.arange(keys.start, keys.stop, device=device)
        seen = (own >= slots) & self.valid[:, None, keys]
        if self.documents is not None and self.key_documents is not None:
            seen &= self.documents[:, queries, None] == self.key_documents[:, None, keys]
        if window is not None:
            seen &= self.places[:, queries, None] < self.key_places[:, None, keys] + window
        # A padding query sees itself: an empty row would be NaN.
        return (seen | (own == slots))[:, None]


def seen_keys(
    B: int,
    T: int,
    positions: Positions,
    state: Mapping[str, Tensor] | None,
    mask: Tensor | None,
) -> Seen:
    """For T queries whose keys follow those of ``state``, which are of a row's first document."""
    valid = mask
    if valid is None:
        valid = torch.ones(B, T, dtype=torch.bool, device=positions.positions.device)
    places = key_places = positions.positions.expand(B, T)
    documents = key_documents = positions.documents
    if state is not None:
        valid = torch.cat([state["valid"], valid], dim=1)
        key_places = torch.cat([state["positions"], places], dim=1)
        if documents is not None:
            kept = documents[:, :1].expand_as(state["valid"])
            key_documents = torch.cat([kept, documents], dim=1)
    return Seen(valid, places, key_places, documents, key_documents, mask is None)
