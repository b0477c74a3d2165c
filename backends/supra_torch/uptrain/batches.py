"""What a device computes at a time: some rows of a batch, and where documents begin in them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from supra_torch.uptrain.data import Mixture, Rows


class Batch(NamedTuple):
    """ids (B, T); cu_seqlens (N + 1,) as SupraModel.hidden takes them, None: a row is one text."""

    ids: Tensor
    cu_seqlens: Tensor | None = None


class Batches:
    """Puts the rows of steps on a device, in shapes that stay the same through a stage.

    ``cut``: rows of a sequence; ``together``: rows that are computed at a time (0: all of them).
    """

    def __init__(self, data: Mixture, cut: int, together: int, device: torch.device) -> None:
        self._together, self._device = together, device
        self._documents = data.most_documents(cut)

    def of(self, rows: Rows) -> list[Batch]:
        """All rows, in order."""
        count = self._together or len(rows)
        return [self._batch(rows[first : first + count]) for first in range(0, len(rows), count)]

    def _batch(self, rows: Rows) -> Batch:
        ids = torch.from_numpy(rows.ids).to(self._device)
        if self._documents == 1:
            return Batch(ids)
        borders = torch.from_numpy(rows.cu_seqlens(self._documents * len(rows)))
        return Batch(ids, borders.to(self._device))
