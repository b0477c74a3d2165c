"""The second half of a block: one gated feed-forward network, or a mixture of them.

Experts stand in a file one by one. Here their matrices are stacked, as mlx-lm's own models have
them, so that one product gathers those that the tokens chose.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.switch_layers import SwitchGLU

from supra_core.model.layout import expert_number, stacked_name
from supra_core.model.spec import LayerSpec, ModelSpec

# How the modules of routers end.
ROUTER = ".mlp.gate"
_STACKED = ".mlp.switch_mlp."


class FeedForward(nn.Module):
    """A gated feed-forward network."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        size, width, bias = spec.hidden_size, spec.intermediate_size, spec.mlp_bias
        self.gate_proj = nn.Linear(size, width, bias=bias)
        self.up_proj = nn.Linear(size, width, bias=bias)
        self.down_proj = nn.Linear(width, size, bias=bias)
        self._gated = swiglu if spec.hidden_act == "silu" else _geglu

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, D) -> (B, T, D)."""
        return self.down_proj(self._gated(self.gate_proj(x), self.up_proj(x)))


class MixtureOfExperts(nn.Module):
    """A token's most probable experts, weighted by their probabilities in float32."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        experts = spec.experts
        assert experts is not None
        self._per_token, self._normalise = experts.per_token, experts.normalise
        self.gate = nn.Linear(spec.hidden_size, experts.count, bias=False)
        gated = swiglu if spec.hidden_act == "silu" else _geglu
        self.switch_mlp = SwitchGLU(
            spec.hidden_size,
            experts.intermediate_size,
            experts.count,
            activation=lambda up, gate: gated(gate, up),
        )

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, D) -> (B, T, D)."""
        p = mx.softmax(self.gate(x).astype(mx.float32), axis=-1)
        k = self._per_token
        chosen = mx.argpartition(-p, kth=k - 1, axis=-1)[..., :k]
        weights = mx.take_along_axis(p, chosen, axis=-1)
        if self._normalise:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        # In the type that the experts are kept in, where that is not packed bits.
        kept = self.switch_mlp.gate_proj.weight.dtype
        experts_input = x.astype(kept) if mx.issubdtype(kept, mx.floating) else x
        out = self.switch_mlp(experts_input, chosen) * weights[..., None]
        return out.sum(axis=-2).astype(x.dtype)


def feed_forward(spec: ModelSpec, layer: LayerSpec) -> nn.Module:
    """The module of a layer."""
    return MixtureOfExperts(spec) if layer.feed_forward == "experts" else FeedForward(spec)


def stacked(
    arrays: Iterable[tuple[str, mx.array]], spec: ModelSpec
) -> Iterator[tuple[str, mx.array]]:
    """Named arrays with the experts' (out, ·) of a layer as one, (count, out, ·); others as is.

    Where experts are missing, or too many, each keeps its name, which strict loading reports.
    On a CPU experts become float32, the one type that MLX gathers products in there.
    """
    alike = _gathered_alike if mx.default_device() == mx.cpu else lambda array: array
    count = 0 if spec.experts is None else spec.experts.count
    waiting: dict[str, dict[int, tuple[str, mx.array]]] = {}
    for name, array in arrays:
        number = expert_number(name)
        if number is None:
            yield name, alike(array) if _STACKED in name else array
            continue
        whole = stacked_name(name)
        parts = waiting.setdefault(whole, {})
        parts[number] = name, array
        if len(parts) == count and max(parts) == count - 1:
            del waiting[whole]
            yield whole, alike(mx.stack([parts[index][1] for index in range(count)]))
    for parts in waiting.values():
        yield from parts.values()


def _gathered_alike(array: mx.array) -> mx.array:
    """An expert's numbers in float32; packed bits and their scales stay as they are."""
    return array.astype(mx.float32) if array.ndim == 3 and _is_half(array) else array


def _is_half(array: mx.array) -> bool:
    return array.dtype in (mx.bfloat16, mx.float16)


@mx.compile
def _geglu(gate: mx.array, x: mx.array) -> mx.array:
    return nn.gelu_approx(gate) * x
