"""Low-rank adapters on the projections of every mixer (LoRA, arXiv 2106.09685).

While a stage trains them the weights they belong to are frozen, so that neither gradients nor
optimiser state of those are kept; when the stage ends they are added to the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from supra_core.model import layout
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor
from supra_torch.model.mixers.base import MixerModule
from supra_torch.model.model import SupraModel

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
# What torch's parametrizations call the frozen weight and what is added to it.
_FROZEN = "parametrizations.weight.original"
_ADDED = "parametrizations.weight.0."


@dataclass(frozen=True)
class Adapters:
    """Adapters' tensors by their names in the module; what is added has the factor alpha / rank."""

    rank: int
    alpha: float
    tensors: Mapping[str, LazyTensor]


class LowRank(nn.Module):
    """weight + alpha / rank B A; A (rank, in), B (out, rank)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.A = nn.Parameter(torch.empty(rank, inputs, device=weight.device))
        self.B = nn.Parameter(torch.empty(outputs, rank, device=weight.device))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        # What is merged in the end is this very sum, so it is not rounded by autocast.
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.B @ self.A)


def begun(spec: ModelSpec, rank: int, seed: int) -> dict[str, LazyTensor]:
    """The tensors of adapters that change nothing yet: A at random, B zero."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (outputs, inputs) in _adapted(spec):
        # Kaiming's uniform with a = sqrt(5), as LoRA's own code draws it.
        bound = 1.0 / math.sqrt(inputs)
        drawn = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        tensors[name + _ADDED + "A"] = LazyTensor.of(drawn.numpy())
        tensors[name + _ADDED + "B"] = LazyTensor.of(torch.zeros(outputs, rank).numpy())
    return tensors


def shapes(spec: ModelSpec, rank: int) -> dict[str, tuple[int, int]]:
    """The shape of each tensor of :func:`begun`."""
    found: dict[str, tuple[int, int]] = {}
    for name, (outputs, inputs) in _adapted(spec):
        found |= {name + _ADDED + "A": (rank, inputs), name + _ADDED + "B": (outputs, rank)}
    return found


def adapter_count(spec: ModelSpec, rank: int) -> int:
    """Parameters of all adapters."""
    return sum(rank * sum(shape) for _, shape in _adapted(spec))


def _adapted(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Of every projection with an adapter, what its tensors' names begin with, and its shape."""
    shapes = layout.tensor_shapes(spec)
    for index in range(spec.num_hidden_layers):
        for target in _TARGETS:
            name = f"{layout.layer_prefix(index)}self_attn.{target}."
            yield name, shapes[name + "weight"]


def attach(model: SupraModel, adapters: Adapters) -> None:
    """Give every mixer's four projections an adapter, whose numbers are still to be filled in."""
    kind: type[nn.Linear] | None = None
    for projection in _projections(model):
        adapter = LowRank(projection.weight, adapters.rank, adapters.alpha)
        # Unsafe leaves out a trial call, which a weight without numbers cannot have.
        parametrize.register_parametrization(projection, "weight", adapter, unsafe=True)
        # torch makes a class for each, though all are alike: layers of as many classes would each
        # be compiled by themselves.
        kind = kind or type(projection)
        projection.__class__ = kind


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return _ADDED in name


def canonical(name: str) -> str:
    """The name of a parameter in the layout; adapters, which have none there, keep theirs."""
    return name.replace(_FROZEN, "weight")


@torch.no_grad()
def merged(model: SupraModel) -> dict[str, Tensor]:
    """The weights under their canonical names, with the adapters, if there are any, added."""
    weights: dict[str, Tensor] = {
        canonical(n): p for n, p in model.named_parameters() if not is_adapter(n)
    }
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module, "weight"):
            weights[name + ".weight"] = module.weight
    return weights


def _projections(model: SupraModel) -> Iterator[nn.Linear]:
    for module in model.modules():
        if isinstance(module, MixerModule):
            for name in _TARGETS:
                yield getattr(module, name)
