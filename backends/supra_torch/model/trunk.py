"""Layers, and what stands around them: embedding, positions, last norm.

Shapes: ids (B, T); hidden states (B, T, D).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from supra_core.mixers.rotary import inverse_frequencies
from supra_core.model.spec import ModelSpec
from supra_torch.model.feed_forward import feed_forward
from supra_torch.model.layers import Exact, NormLayer, Positions, exact, for_products
from supra_torch.model.mixers import mixer_module
from supra_torch.model.mixers.base import LayerState
from supra_torch.ops.linear_attention import document_numbers

if TYPE_CHECKING:
    from supra_torch.model.context_parallel import Part

Rotations = dict[int, tuple[Tensor, Tensor]]
# What the names of the local rotation's frequencies begin with.
_LOCAL = "local_"


@dataclass(frozen=True)
class ModelState:
    """What a batch of sequences remembers: tokens seen (B,), and named tensors a layer."""

    tokens: Tensor
    layers: tuple[LayerState, ...]


class Layer(nn.Module):
    """A residual block; without ``remember`` the mixer's new state is dropped."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        layer = spec.layers[index]
        before, after = spec.block_norm != "after", spec.block_norm != "before"

        def norm(present: bool) -> NormLayer | None:
            return NormLayer(spec.hidden_size, spec.norm) if present else None

        self.residual_scale = spec.residual_scale
        self.input_layernorm = norm(before)
        self.self_attn = mixer_module(spec, layer.mixer)
        self.mixer_output_norm = norm(after)
        self.post_attention_layernorm = norm(before)
        self.mlp = feed_forward(spec, layer)
        self.mlp_output_norm = norm(after)

    def forward(
        self,
        h: Tensor,
        positions: Positions,
        state: LayerState | None,
        mask: Tensor | None,
        remember: bool = True,
    ) -> tuple[Tensor, LayerState]:
        mixed, memory = self.self_attn(self.mixer_input(h), positions, state, mask)
        h = self.add_mixed(h, mixed)
        return h + self.feed_forward(h), _left(memory, remember)

    def mix(
        self,
        x: Tensor,
        positions: Positions,
        state: LayerState | None = None,
        remember: bool = False,
    ) -> tuple[Tensor, LayerState]:
        """The mixer alone, from its normed input x (B, T, D): output (B, T, D) and new state."""
        mixed, memory = self.self_attn(x, positions, state, None)
        return mixed, _left(memory, remember)

    def mixer_input(self, h: Tensor) -> Tensor:
        """h (B, T, D), normed where the block does so, cast once for all projections of it."""
        return for_products(h if self.input_layernorm is None else self.input_layernorm(h))

    def add_mixed(self, h: Tensor, mixed: Tensor) -> Tensor:
        """h (B, T, D) and the mixer's output, as the block adds it."""
        return h + self._added(mixed, self.mixer_output_norm)

    def feed_forward(self, h: Tensor) -> Tensor:
        """What the second half of the block adds to h (B, T, D)."""
        norm = self.post_attention_layernorm
        out: Tensor = self.mlp(for_products(h if norm is None else norm(h)))
        return self._added(out, self.mlp_output_norm)

    def _added(self, x: Tensor, norm: NormLayer | None) -> Tensor:
        if norm is not None:
            x = norm(x)
        return x if self.residual_scale == 1.0 else x * self.residual_scale


def _left(memory: LayerState, remember: bool) -> LayerState:
    """What a layer returns of its mixer's state; where there is a graph no views, for FSDP."""
    if not remember:
        return {}
    if not torch.is_grad_enabled():
        return memory
    return {name: x.clone() for name, x in memory.items()}


def frequencies(spec: ModelSpec) -> dict[str, Exact]:
    """The frequencies of each width that any layer rotates."""
    found = {}
    for mixer in (layer.mixer for layer in spec.layers):
        width, rope = mixer.rotated_width(spec), mixer.rope_of(spec)
        if width is not None:
            name = f"{_LOCAL}{width}" if mixer.rotary == "local" else str(width)
            found[name] = Exact(inverse_frequencies(rope, width))
    return dict(sorted(found.items()))


class Trunk(nn.Module):
    """Embedding, layers and the last norm; the level that names begin with ``model.``."""

    def __init__(self, spec: ModelSpec, layer: type[Layer] = Layer) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.embed_norm = NormLayer(spec.hidden_size, spec.norm) if spec.embedding_norm else None
        self.layers = nn.ModuleList(layer(spec, index) for index in range(spec.num_hidden_layers))
        self.norm = NormLayer(spec.hidden_size, spec.norm)


class Parts(Protocol):
    """The modules of a trunk."""

    embed_tokens: nn.Embedding
    embed_norm: NormLayer | None
    norm: NormLayer


class Computation:
    """What a model computes around its layers, from its spec, its trunk and its frequencies."""

    spec: ModelSpec
    frequencies: nn.ModuleDict

    @property
    def trunk(self) -> Parts:
        raise NotImplementedError

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, D), what the first layer receives."""
        return self.scaled(self.trunk.embed_tokens(ids))

    def scaled(self, h: Tensor) -> Tensor:
        """Embeddings (B, T, D) as the first layer receives them."""
        if self.spec.embedding_scale != 1.0:
            # Rounded to the weights' type, as transformers multiplies.
            h = h * torch.tensor(self.spec.embedding_scale, dtype=h.dtype).item()
        return h if self.trunk.embed_norm is None else self.trunk.embed_norm(h)

    def positions(
        self,
        ids: Tensor,
        state: ModelState | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        part: Part | None = None,
        own_seqlens: Tensor | None = None,
    ) -> Positions:
        """Where the tokens of ids (B, T) stand; padding does not count, documents begin at 0.

        Those of ``part`` alone, where several processes share the rows; ``own_seqlens``: where
        documents begin among its tokens, if that is known, for there may be fewer.
        """
        documents = None
        if cu_seqlens is not None:
            if state is not None or mask is not None:
                raise ValueError("packed documents take no state and no mask")
            documents = document_numbers(cu_seqlens, ids.numel())
            number = torch.arange(ids.numel(), device=ids.device)
            steps = (number - cu_seqlens.long()[documents]).view(ids.shape)
            documents = documents.view(ids.shape)
        elif mask is not None:
            steps = (mask.long().cumsum(1) - 1).clamp(min=0)
        else:
            steps = torch.arange(ids.shape[1], device=ids.device)[None]
        if state is not None:
            steps = steps + state.tokens[:, None]
        places = Positions(steps, {}, self.spec.rope.pairing, cu_seqlens, documents)
        if part is not None:
            places = places.shared(part, len(ids), own_seqlens)
        tables, local_tables = self._rotations(places.positions)
        return replace(places, tables=tables, local_tables=local_tables)

    def _rotations(self, steps: Tensor) -> tuple[Rotations, Rotations]:
        """The tables of :class:`Positions` for tokens that stand there, and the local ones."""
        tables: Rotations = {}
        local_tables: Rotations = {}
        for name, theta in self.frequencies.items():
            assert isinstance(theta, Exact)
            # float64: a float32 angle is off by 4e-3 at position 65,536.
            places = exact(steps)
            angles = places[..., None, None] * theta.values.to(places.device)
            local = name.startswith(_LOCAL)
            rope = self.spec.local_rope if local and self.spec.local_rope else self.spec.rope
            cos, sin = rope.magnitude * angles.cos(), rope.magnitude * angles.sin()
            of = local_tables if local else tables
            pair = cos.float().to(steps.device), sin.float().to(steps.device)
            of[int(name.removeprefix(_LOCAL))] = pair
        return tables, local_tables

    def last(self, h: Tensor) -> Tensor:
        """What the head receives of the last layer's output h (B, T, D)."""
        normed: Tensor = self.trunk.norm(h)
        divisor = self.spec.logits_divisor
        return normed if divisor == 1.0 else normed / divisor

    def capped(self, logits: Tensor) -> Tensor:
        """The logits, softcapped where the model does so."""
        cap = self.spec.logits_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)
