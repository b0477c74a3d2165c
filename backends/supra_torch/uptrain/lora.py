"""Low-rank adapters on the projections of every mixer (LoRA, arXiv 2106.09685).

While a stage trains them the weights they belong to are frozen, so that neither gradients nor
optimiser state of those are kept; when the stage ends they are added to the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from supra_core.tensors import LazyTensor
from supra_torch.mixers import Mixer
from supra_torch.model import SupraModel, lazy_tensors

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
# What torch's parametrizations call the frozen weight and what is added to it.
_FROZEN = "parametrizations.weight.original"
_ADDED = "parametrizations.weight.0."


class LowRank(nn.Module):
    """weight + alpha / rank B A; A (rank, in) at random, B (out, rank) zero at first."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        # Kaiming's uniform with a = sqrt(5), as LoRA's own code draws it.
        bound = 1.0 / math.sqrt(inputs)
        drawn = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(drawn.to(weight.device))
        self.B = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        # What is merged in the end is this very sum, so it is not rounded by autocast.
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.B @ self.A)


def attach(model: SupraModel, rank: int, alpha: float, seed: int) -> None:
    """Give every mixer's four projections an adapter, which changes nothing yet."""
    generator = torch.Generator().manual_seed(seed)
    for projection in _projections(model):
        adapter = LowRank(projection.weight, rank, alpha, generator)
        parametrize.register_parametrization(projection, "weight", adapter)


def merge(model: SupraModel) -> None:
    """Add the adapters, if there are any, to their weights and take them away."""
    for projection in _projections(model):
        if parametrize.is_parametrized(projection, "weight"):
            parametrize.remove_parametrizations(projection, "weight", leave_parametrized=True)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return _ADDED in name


def frozen_tensors(model: SupraModel) -> dict[str, LazyTensor]:
    """The weights without their adapters under their canonical names, for a writer."""
    return {
        name.replace(_FROZEN, "weight"): tensor
        for name, tensor in lazy_tensors(model).items()
        if not is_adapter(name)
    }


def adapters(model: SupraModel) -> dict[str, Tensor]:
    """The adapters' tensors by name; none outside a stage that trains them."""
    return {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if is_adapter(name)
    }


def load_adapters(model: SupraModel, stored: Mapping[str, Tensor]) -> None:
    """Put back what :func:`adapters` gave; the names must be the same."""
    own = {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}
    if own.keys() != stored.keys():
        raise ValueError("these are the adapters of another stage")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])


def _projections(model: SupraModel) -> Iterator[nn.Linear]:
    for module in model.modules():
        if isinstance(module, Mixer):
            for name in _TARGETS:
                yield getattr(module, name)
