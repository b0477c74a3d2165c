"""What ``supra bench op`` compares: problem sizes, our implementations, and their peers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from supra_torch.ops import linear_attention

Operands = tuple[Tensor, Tensor, Tensor]
Run = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (B, T, H, Dk), k (B, T, K, Dk), v (B, T, K, Dv) -> output (B, T, H, Dv)."""


@dataclass(frozen=True)
class Shape:
    """One problem: q (B, T, H, Dk), k (B, T, K, Dk), v (B, T, K, Dv)."""

    name: str
    B: int
    T: int
    H: int
    K: int
    Dk: int
    Dv: int

    def forward_bytes(self, itemsize: int) -> int:
        """What has to be read and written once; backward is three times that."""
        return itemsize * self.B * self.T * (self.H + self.K) * (self.Dk + self.Dv)


def _shapes() -> dict[str, Shape]:
    published = ((1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128), (4, 4096, 64, 128),
                 (8, 1024, 8, 64))  # fmt: skip
    layers = {
        "SmolLM2-135M": (9, 3, 64, 64),
        "SmolLM2-135M-F128": (9, 3, 128, 64),  # a feature map of 128 channels
        "Mistral-7B": (32, 8, 128, 128),
        "Llama-2-7B": (32, 32, 128, 128),
    }
    shapes = [Shape(f"B{B}-T{T}-H{H}-D{D}", B, T, H, H, D, D) for B, T, H, D in published]
    shapes += [
        Shape(f"{name}-T{T}", 1, T, *sizes) for name, sizes in layers.items() for T in (2048, 16384)
    ]
    return {shape.name: shape for shape in shapes}


SHAPES = _shapes()
"""The shapes that others publish times of, and layers of well-known models."""

CPU_SHAPES = ("B8-T1024-H8-D64", "SmolLM2-135M-T2048", "SmolLM2-135M-F128-T2048")
"""What a CPU measures unless asked for more: about a minute on two cores."""


@dataclass(frozen=True)
class Candidate:
    """An implementation: ``prepare`` gives its function for a shape's decay, slope (H,) float64.

    ``prepare`` raises ImportError or ValueError, with the reason, where it cannot run.
    """

    name: str
    prepare: Callable[[Tensor], Run]
    softmax: bool = False


def _ours(implementation: Any) -> Callable[[Tensor], Run]:
    def prepare(slope: Tensor) -> Run:
        decay = torch.exp(-slope)
        return lambda q, k, v: linear_attention(q, k, v, decay, implementation=implementation)[0]

    return prepare


def _fla_retention(slope: Tensor) -> Run:
    from fla.ops.retention import chunk_retention

    return lambda q, k, v: chunk_retention(*_repeated(q, k, v), scale=1.0)[0]


def _fla_simple_gla(slope: Tensor) -> Run:
    from fla.ops.simple_gla import chunk_simple_gla

    g_gamma = -slope.float()
    return lambda q, k, v: chunk_simple_gla(*_repeated(q, k, v), g_gamma=g_gamma, scale=1.0)[0]


def _sdpa(slope: Tensor) -> Run:
    return _softmax


def _softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _repeated(q: Tensor, k: Tensor, v: Tensor) -> Operands:
    """Key/value heads repeated for kernels that know no groups."""
    G = q.shape[2] // k.shape[2]
    if G == 1:
        return q, k, v
    return q, k.repeat_interleave(G, dim=2), v.repeat_interleave(G, dim=2)


CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        Candidate("triton", _ours("triton")),
        Candidate("chunked", _ours("chunked")),
        Candidate("fla-retention", _fla_retention),
        Candidate("fla-simple-gla", _fla_simple_gla),
        Candidate("sdpa", _sdpa, softmax=True),
    )
}
"""Ours, flash-linear-attention's, and torch's causal softmax attention."""
