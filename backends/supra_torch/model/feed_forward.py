"""The second half of a block: one gated feed-forward network, or a mixture of them.

Shapes: x (B, T, D); N = B T tokens, k experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supra_core.model.spec import LayerSpec, ModelSpec
from supra_torch.ops.target import is_planned

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class FeedForward(nn.Module):
    """A gated feed-forward network (arXiv 2002.05202)."""

    def __init__(self, size: int, width: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, width, bias=bias)
        self.up_proj = nn.Linear(size, width, bias=bias)
        self.down_proj = nn.Linear(width, size, bias=bias)
        self.activation = _ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))
        return out


class MixtureOfExperts(nn.Module):
    """A token's most probable experts, weighted by their probabilities (arXiv 2401.04088).

    Computed are the experts that a token chose, which are known on the host only once the router
    is done: a step can be neither compiled nor captured as a whole.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        experts = spec.experts
        assert experts is not None
        self.per_token, self.normalise = experts.per_token, experts.normalise
        self.gate = nn.Linear(spec.hidden_size, experts.count, bias=False)
        self.experts = nn.ModuleList(
            FeedForward(spec.hidden_size, experts.intermediate_size, spec.hidden_act)
            for _ in range(experts.count)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, D) -> (B, T, D); sums are float32."""
        flat = x.flatten(0, -2)
        weights, chosen = self.route(flat)
        order = chosen.flatten().argsort(stable=True)
        out = torch.zeros_like(flat, dtype=weights.dtype)
        for expert, places in zip(self.experts, order.split(self._loads(chosen)), strict=True):
            if len(places):
                tokens = places // self.per_token
                y = expert(flat[tokens]) * weights.flatten()[places, None]
                out.index_add_(0, tokens, y)
        return out.to(x.dtype).view_as(x)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, D) -> weights (N, k), at least float32, and the experts they are of, (N, k)."""
        logits = self.gate(x)
        p = logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, chosen = p.topk(self.per_token, dim=-1)
        return weights / weights.sum(-1, keepdim=True) if self.normalise else weights, chosen

    def _loads(self, chosen: Tensor) -> list[int]:
        """How many tokens each expert gets; where nothing is computed, all get alike."""
        count = len(self.experts)
        if is_planned():
            share, rest = divmod(chosen.numel(), count)
            return [share + (index < rest) for index in range(count)]
        loads: list[int] = chosen.flatten().bincount(minlength=count).tolist()
        return loads


def feed_forward(spec: ModelSpec, layer: LayerSpec) -> FeedForward | MixtureOfExperts:
    """The module of a layer."""
    if layer.feed_forward == "experts":
        return MixtureOfExperts(spec)
    return FeedForward(
        spec.hidden_size, spec.intermediate_size, spec.hidden_act, bias=spec.mlp_bias
    )
