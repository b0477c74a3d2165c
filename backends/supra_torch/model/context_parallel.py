"""Rows that several processes share, each of which computes a part of every row's tokens.

Context parallelism (https://arxiv.org/abs/2404.02882), for layers that pass on a state of fixed
size: all processes compute a layer at the same time. With F_i the state that part i of n tokens
ends with when it begins from nothing, part r begins with::

    S_r = sum_{i < r} gamma^(n (r - 1 - i)) F_i

so that a layer exchanges a state for each process, whatever the length. A window needs the last
tokens of the part before as well. Softmax over all tokens divides its heads among the processes
meanwhile, each of which then has whole rows (https://arxiv.org/abs/2309.14509).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName

from supra_torch.ops.final_state import final_state


@dataclass(frozen=True)
class Part:
    """The ``number``-th of ``count`` equal parts of every row; ``group``: its processes' name."""

    number: int
    count: int
    group: GroupName

    def of(self, tokens: int) -> slice:
        """Which of a row's tokens; they are a multiple of the parts."""
        own = tokens // self.count
        return slice(self.number * own, (self.number + 1) * own)

    def before(self, places: Tensor, documents: Tensor | None, rows: int) -> Before:
        """From the positions (B or 1, T) and the documents (B, T) of whole rows."""
        T, device = places.shape[1], places.device
        reached = (torch.arange(self.count, device=device) < self.number)[:, None].expand(-1, rows)
        if documents is not None:
            own, length = self.of(T), T // self.count
            ends = documents[:, length - 1 :: length] == documents[:, own.start, None]
            reached = reached & ends.T
        return Before(self, reached, places.expand(rows, -1), documents)

    def exchange(self, x: Tensor) -> Tensor:
        """x (count, ...), something for every part -> what every part has for this one."""
        return self._exchanged(x, None, None).view(x.shape)

    def gather(self, x: Tensor) -> Tensor:
        """What every part has in the place of x: (count, ...); gradients go back to all."""
        return self.exchange(x.expand(self.count, *x.shape))

    def of_the_part_before(self, x: Tensor) -> Tensor:
        """What the part before this one has in the place of x; zeros for the first."""
        sent, came = [0] * self.count, [0] * self.count
        if self.number + 1 < self.count:
            sent[self.number + 1] = x.numel()
        if self.number:
            came[self.number - 1] = x.numel()
        found = self._exchanged(x if any(sent) else x[:0], came, sent)
        return F.pad(found, (x.numel() - sum(came), 0)).view(x.shape)

    def _exchanged(self, x: Tensor, came: list[int] | None, sent: list[int] | None) -> Tensor:
        found: Tensor = collectives.all_to_all_single_autograd(
            x.contiguous().flatten(), came, sent, self.group
        )
        return found

    def by_heads(self, x: Tensor, of: int) -> Tensor:
        """x (B, T, heads, D) of this part -> (B, count T, heads / count, D) of whole rows.

        ``of``: the query heads that these are for, a multiple. They are repeated as often as it
        takes to divide them, and those of zeros added that are missing still.
        """
        heads = x.shape[2]
        even = math.lcm(heads, self.count)
        x = x.repeat_interleave((of if of % even else even) // heads, dim=2)
        x = F.pad(x, (0, 0, 0, -x.shape[2] % self.count))
        x = x.unflatten(2, (self.count, -1)).movedim(2, 0)
        return self.exchange(x).movedim(0, 1).flatten(1, 2)

    def by_tokens(self, x: Tensor, heads: int) -> Tensor:
        """The way back: (B, count T, ., D) -> (B, T, heads, D)."""
        x = x.unflatten(1, (self.count, -1)).movedim(1, 0)
        return self.exchange(x).movedim(0, 2).flatten(2, 3)[:, :, :heads]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all parts of x, without gradients."""
        total: Tensor = collectives.all_reduce(x.contiguous(), "sum", self.group)
        return total


@dataclass(frozen=True)
class Before:
    """What a part of every row can learn of the tokens before it.

    ``reached`` (count, B) bool: the earlier parts that end in the document which this one begins
    in; ``places`` (B, T) and ``documents`` (B, T), None for one a row: of the whole rows' tokens.
    """

    part: Part
    reached: Tensor
    places: Tensor
    documents: Tensor | None

    def state(
        self, k: Tensor, v: Tensor, slope: Tensor, counted: Tensor | None, normalise: bool
    ) -> Tensor:
        """The state to begin with, (B, H, Dk, Dv) or one more column; all parts call it.

        The arguments are this part's, as :func:`final_state` takes them; what counts is of the
        document that it ends in.
        """
        ends = self.part.gather(final_state(k, v, slope.float(), counted, normalise))
        between = self.part.number - 1 - torch.arange(self.part.count, device=k.device)
        tokens = between.clamp(min=0) * k.shape[1]
        decays = torch.exp(-slope.double() * tokens[:, None])
        # (count, B, H)
        weights = decays[:, None] * self.reached[..., None]
        return (weights.to(ends.dtype)[..., None, None] * ends).sum(0)

    def last(self, x: Tensor, slots: int) -> Tensor:
        """The last so many of all parts' x (B, T, ...) before this one's; all parts call it.

        What stands in slots for which there is no token is not :meth:`valid`.
        """
        if slots <= x.shape[1]:
            return self.part.of_the_part_before(x[:, x.shape[1] - slots :])
        return self._slots(self.part.gather(x).movedim(0, 1).flatten(1, 2), slots)

    def valid(self, slots: int) -> Tensor:
        """Which of the last so many tokens are of this part's first document, (B, slots) bool."""
        if self.documents is None:
            return self._slots(torch.ones_like(self.places, dtype=torch.bool), slots)
        start = self.part.of(self.places.shape[1]).start
        return self._slots(self.documents == self.documents[:, start, None], slots)

    def positions(self, slots: int) -> Tensor:
        """Where the last so many tokens stand, (B, slots)."""
        return self._slots(self.places, slots)

    def _slots(self, x: Tensor, slots: int) -> Tensor:
        """Of x (B, T, ...) for whole rows the last so many before this part, zeros in front."""
        start = self.part.of(x.shape[1]).start
        missing = (0, 0) * (x.ndim - 2) + (max(0, slots - start), 0)
        return F.pad(x[:, max(0, start - slots) : start], missing)
