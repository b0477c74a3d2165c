"""What a device computes at a time: some rows of a batch, and where documents begin in them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from supra_torch.model.context_parallel import Part
from supra_torch.model.layers import Positions
from supra_torch.model.model import SupraModel
from supra_torch.uptrain.step.data import Mixture, Rows


class Batch(NamedTuple):
    """ids (B, T); cu_seqlens (N + 1,) as SupraModel.hidden takes them, None: a row is one text.

    ``part``: what this process computes of these rows, where several share them; ``own_seqlens``:
    where documents begin among its tokens.
    """

    ids: Tensor
    cu_seqlens: Tensor | None = None
    part: Part | None = None
    own_seqlens: Tensor | None = None

    @property
    def own(self) -> slice:
        """Which tokens of every row this process computes."""
        tokens = self.ids.shape[1]
        return slice(0, tokens) if self.part is None else self.part.of(tokens)

    def positions(self, model: SupraModel) -> Positions:
        """Where they stand."""
        return model.positions(
            self.ids, cu_seqlens=self.cu_seqlens, part=self.part, own_seqlens=self.own_seqlens
        )


class Batches:
    """Puts the rows of steps on a device, in shapes that stay the same through a stage.

    ``cut``: rows of a sequence; ``together``: rows that are computed at a time (0: all of them);
    ``part``: of every row, None for all of it.
    """

    def __init__(
        self,
        data: Mixture,
        cut: int,
        together: int,
        device: torch.device,
        part: Part | None = None,
    ) -> None:
        self._together, self._device, self._part = together, device, part
        self._documents = data.most_documents(cut)
        self._own_documents = 1 if part is None else data.most_documents(cut * part.count)

    def of(self, rows: Rows) -> list[Batch]:
        """All rows, in order."""
        count = self._together or len(rows)
        return [self._batch(rows[first : first + count]) for first in range(0, len(rows), count)]

    def _batch(self, rows: Rows) -> Batch:
        ids = torch.from_numpy(rows.ids).to(self._device)
        if self._documents == 1:
            return Batch(ids, part=self._part)
        borders = self._borders(rows, self._documents)
        part, own = self._part, None
        if part is not None:
            own = self._borders(
                rows.cut(part.count)[part.number :: part.count], self._own_documents
            )
        return Batch(ids, borders, part, own)

    def _borders(self, rows: Rows, documents: int) -> Tensor:
        return torch.from_numpy(rows.cu_seqlens(documents * len(rows))).to(self._device)
