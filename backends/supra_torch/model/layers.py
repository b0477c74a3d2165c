"""Small parts of the model: exact constants, rotations, norms, the feature map's projection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supra_core.mixers.parts import Norm, Projection
from supra_torch.ops.linear_attention import document_numbers
from supra_torch.ops.rms_norm import rms_norm
from supra_torch.ops.rotation import rotated

if TYPE_CHECKING:
    from supra_torch.model.context_parallel import Before, Part


class Exact(nn.Module):
    """A float64 constant that follows the module's device and is never rounded by a cast."""

    def __init__(self, values: npt.NDArray[np.float64]) -> None:
        super().__init__()
        self.register_buffer("values", torch.from_numpy(values), persistent=False)
        self.values: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Exact:
        device = fn(torch.empty(0, dtype=torch.float32, device=self.values.device)).device
        # Metal has no float64.
        self.values = self.values.to("cpu" if device.type == "mps" else device)
        return self


def exact(x: Tensor) -> Tensor:
    """x in float64, on the CPU if its device has no such type."""
    return (x.cpu() if x.device.type == "mps" else x).double()


@dataclass(frozen=True)
class Positions:
    """The tokens' positions (B, T), and their rotation.

    ``tables``: for each number of channels the angles' cosines and sines, (B, T, 1, d / 2)
    float32 for the first d channels, which rotate, computed once a forward; ``local_tables`` are
    those of the spec's local rope. ``cu_seqlens`` (N + 1,) and ``documents`` (B, T), where rows
    are packed: where each document begins among all B T tokens, and which one each belongs to.
    ``goes_on`` (B,) bool, of a part of packed rows: which rows' first document is the one of the
    state before. ``before``: of a part of rows whose other parts other processes compute.
    """

    positions: Tensor
    tables: Mapping[int, tuple[Tensor, Tensor]]
    pairing: str
    cu_seqlens: Tensor | None = None
    documents: Tensor | None = None
    local_tables: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    goes_on: Tensor | None = None
    before: Before | None = None

    @property
    def by_row(self) -> bool:
        """Whether these are a part of packed rows, each of which has a state of its own."""
        return self.goes_on is not None

    def joined(self, others: Positions) -> Positions:
        """With the tables of another model at the same places, whose mixers rotate other widths."""
        return replace(
            self,
            tables={**others.tables, **self.tables},
            local_tables={**others.local_tables, **self.local_tables},
        )

    def part(self, tokens: slice, borders: Tensor | None = None) -> Positions:
        """Those of some of the tokens of every row, to which a state comes from those before.

        ``borders`` (N + 1,): where packed documents begin among these, if that is known.
        """

        def cut(tables: Mapping[int, tuple[Tensor, Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
            return {size: (cos[:, tokens], sin[:, tokens]) for size, (cos, sin) in tables.items()}

        own = replace(
            self,
            positions=self.positions[:, tokens],
            tables=cut(self.tables),
            local_tables=cut(self.local_tables),
        )
        if self.cu_seqlens is None or self.documents is None:
            return own
        T, length = self.positions.shape[1], own.positions.shape[1]
        if borders is None:
            borders = _borders_within(self.cu_seqlens, T, tokens.start, length, len(self.positions))
        numbers = document_numbers(borders, own.positions.numel()).view(own.positions.shape)
        at, before = (
            self.documents[:, max(0, place)] for place in (tokens.start, tokens.start - 1)
        )
        return replace(own, cu_seqlens=borders, documents=numbers, goes_on=at == before)

    def shared(self, part: Part, rows: int, borders: Tensor | None) -> Positions:
        """Those of one of several processes' part of every row; ``borders`` as :meth:`part`'s."""
        own = self.part(part.of(self.positions.shape[1]), borders)
        return replace(own, before=part.before(self.positions, self.documents, rows))

    def rotate(self, x: Tensor, rope: str = "global") -> Tensor:
        """x (B, T, heads, channels) rotated in float32, returned in its own type.

        ``rope``: ``global``, ``local`` or ``none``, as the spec's mixers name them.
        """
        if rope == "none":
            return x
        tables = self.local_tables if rope == "local" else self.tables
        cos, sin = tables[x.shape[-1]]
        width, half = 2 * cos.shape[-1], self.pairing == "half"
        if width == x.shape[-1]:
            return rotated(x, cos, sin, half)
        return torch.cat([rotated(x[..., :width], cos, sin, half), x[..., width:]], dim=-1)


def _borders_within(cu_seqlens: Tensor, T: int, start: int, length: int, rows: int) -> Tensor:
    """Where documents begin among the tokens start to start + length of every row of T tokens.

    (N + 1 + rows,): all there were, those elsewhere as empty ones, and one at each row's begin.
    """
    row, place = cu_seqlens // T, cu_seqlens % T
    begins = row * length + (place - start).clamp(0, length)
    own = torch.arange(rows, device=cu_seqlens.device, dtype=cu_seqlens.dtype) * length
    return torch.cat([begins, own]).sort().values


class NormLayer(nn.Module):
    """RMSNorm, or LayerNorm with a gain only, computed in float32."""

    def __init__(self, size: int, norm: Norm) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.weight.float()
        if self.norm.weight_offset:
            gain = gain + self.norm.weight_offset
        if self.norm.kind == "rms_norm":
            out = rms_norm(x.float(), gain, self.norm.eps)
        else:
            out = F.layer_norm(x.float(), gain.shape, gain, None, self.norm.eps)
        return out.to(x.dtype)


class FeatureProjection(nn.Module):
    """The learned part of a feature map, over all heads together or for each head."""

    def __init__(self, projection: Projection, heads: int, size: int, channels: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.per_head = projection.scope == "per_head"
        if self.per_head:
            weight, bias = (heads, size, channels), (heads, size)
        else:
            weight, bias = (heads * size, heads * channels), (heads * size,)  # type: ignore[assignment]
        self.weight = nn.Parameter(torch.empty(weight))
        self.bias = nn.Parameter(torch.empty(bias)) if projection.bias else None

    def forward(self, z: Tensor) -> Tensor:
        if not self.per_head:
            z = F.linear(z.flatten(-2), self.weight, self.bias)
            return z.unflatten(-1, (self.heads, self.size))
        z = torch.einsum("bthd,hfd->bthf", z, self.weight)
        return z if self.bias is None else z + self.bias.to(z.dtype)

    def after(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """The map of x (B, T, D) projected to heads: (B, T, heads, size).

        For many tokens the two matrices of each head are multiplied first: D rows, not B T, go
        through the second, and nothing between them is kept for backward.
        """
        if not self.per_head or x.shape[0] * x.shape[1] < x.shape[2]:
            return self(projection(x).unflatten(-1, (self.heads, -1)))
        with torch.autocast(x.device.type, enabled=False):
            channels = self.weight.shape[2]
            weight = (self.weight @ projection.weight.view(self.heads, channels, -1)).flatten(0, 1)
            bias: Tensor | None = self.bias
            if projection.bias is not None:
                moved = (self.weight @ projection.bias.view(self.heads, channels, 1)).squeeze(-1)
                bias = moved if bias is None else bias + moved
        out = F.linear(x, weight, None if bias is None else bias.flatten())
        return out.unflatten(-1, (self.heads, -1))


def activate(activation: str, z: Tensor) -> Tensor:
    """A feature map's activation over the last axis; signed ones double it."""
    if activation == "relu":
        return torch.relu(z)
    if activation == "signed_relu":
        return torch.cat([torch.relu(z), torch.relu(-z)], dim=-1)
    if activation == "signed_softmax":
        # Computed in float32 and rounded once, whatever the type of z.
        return torch.cat([z.softmax(-1), (-z).softmax(-1)], dim=-1)
    return z


def for_products(x: Tensor) -> Tensor:
    """x in the type autocast multiplies in, where it is enabled."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x
