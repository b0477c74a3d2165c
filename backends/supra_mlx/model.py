"""The model of any spec, by mlx-lm's protocol: ``Model(ModelArgs.from_dict(config))``.

Parameters carry the names of :mod:`supra_core.model.layout`. Nothing is evaluated in here, so that
mlx-lm's generator can run ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs

from supra_core.artifact.config import config_to_spec
from supra_core.model.layout import FLOAT32_SUFFIXES
from supra_core.model.spec import LayerSpec, ModelSpec
from supra_mlx.feed_forward import ROUTER, feed_forward, stacked
from supra_mlx.mixers import mixer_module
from supra_mlx.mixers.base import Context, MixerModule
from supra_mlx.norms import norm_module
from supra_mlx.rotary import Rotary, unrotated


@dataclass
class ModelArgs(BaseModelArgs):
    """What mlx-lm builds a model from: here a spec."""

    spec: ModelSpec
    model_type: str = "supra"

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> ModelArgs:
        """From a folder's config.json; raises SpecError when it does not describe a model."""
        return cls(spec=config_to_spec(params, "config.json"))


class Block(nn.Module):
    """A residual block."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        before, after = spec.block_norm != "after", spec.block_norm != "before"
        self._residual_scale = spec.residual_scale
        names = (("input_layernorm", before), ("mixer_output_norm", after),
                 ("post_attention_layernorm", before), ("mlp_output_norm", after))  # fmt: skip
        for name, present in names:
            if present:
                setattr(self, name, norm_module(spec.norm, spec.hidden_size))
        self.self_attn = mixer_module(spec, layer.mixer)
        self.mlp = feed_forward(spec, layer)

    def __call__(self, h: mx.array, cache: Any, context: Context) -> mx.array:
        """(B, T, D) -> (B, T, D)."""
        mixed = self.self_attn(self._normed("input_layernorm", h), cache, context)
        h = h + self._added("mixer_output_norm", mixed)
        out = self.mlp(self._normed("post_attention_layernorm", h))
        return h + self._added("mlp_output_norm", out)

    def _normed(self, name: str, x: mx.array) -> mx.array:
        """x through a norm that a block has or has not."""
        return self[name](x) if name in self else x

    def _added(self, name: str, x: mx.array) -> mx.array:
        """What the block adds of a sublayer's output."""
        x = self._normed(name, x)
        return x if self._residual_scale == 1.0 else x * self._residual_scale


class Body(nn.Module):
    """Everything below the output head."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self._embedding_scale = spec.embedding_scale
        self._logits_divisor = spec.logits_divisor
        if spec.embedding_norm:
            self.embed_norm = norm_module(spec.norm, spec.hidden_size)
        self.layers = [Block(spec, layer) for layer in spec.layers]
        self.norm = norm_module(spec.norm, spec.hidden_size)

    def __call__(self, inputs: mx.array, cache: list[Any], context: Context) -> mx.array:
        """Ids (B, T) -> (B, T, D), what the head receives."""
        h = self.embed_tokens(inputs)
        if self._embedding_scale != 1.0:
            # Rounded to the weights' type, as transformers multiplies.
            h = h * mx.array(self._embedding_scale, dtype=h.dtype)
        if "embed_norm" in self:
            h = self.embed_norm(h)
        for layer, memory in zip(self.layers, cache, strict=True):
            h = layer(h, memory, context)
        h = self.norm(h)
        return h if self._logits_divisor == 1.0 else h / self._logits_divisor


class Model(nn.Module):
    """A spec's model, randomly initialised until weights are loaded."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Body(args.spec)
        if not args.spec.tie_word_embeddings:
            self.lm_head = nn.Linear(args.spec.hidden_size, args.spec.vocab_size, bias=False)
        ropes = {"global": args.spec.rope, "local": args.spec.local_rope}
        self._rotaries = {name: Rotary(rope) for name, rope in ropes.items() if rope is not None}
        # The layer whose cache tells positions and padding; None: positions are any cache's.
        self._positions = next((i for i, m in enumerate(self.mixers) if m.keeps_positions), None)

    @property
    def spec(self) -> ModelSpec:
        """What this model is."""
        return self.args.spec

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return self.model.layers

    @property
    def mixers(self) -> list[MixerModule]:
        """Each layer's mixer, in order: it knows the layer's cache."""
        return [layer.self_attn for layer in self.layers]

    def __call__(
        self, inputs: mx.array, cache: list[Any] | None = None, mask: mx.array | None = None
    ) -> mx.array:
        """Logits (B, T, V) of ids (B, T); ``cache`` is updated.

        mask (B, S) bool: which of the S = cached + new tokens are no padding; padding may stand
        anywhere, and its logits mean nothing. It needs a cache of ``make_cache(bounded=False)``.
        Without it mlx-lm's own padding counts, which its batch generator puts in the caches.
        """
        cache = self.make_cache() if cache is None else cache
        h = self.model(inputs, cache, self._context(inputs, cache, mask))
        if self._positions is not None:
            # Every layer's padding is the same: only this one's is kept up to date, because lazy
            # updates that nobody reads pile up.
            cache[self._positions].advance(inputs.shape[1])
        if self.spec.tie_word_embeddings:
            logits = self.model.embed_tokens.as_linear(h)
        else:
            logits = self.lm_head(h)
        cap = self.spec.logits_softcap
        return logits if cap is None else cap * mx.tanh(logits / cap)

    def _context(self, inputs: mx.array, cache: list[Any], history: mx.array | None) -> Context:
        B, T = inputs.shape
        teller = self._positions or 0
        mixer, first = self.mixers[teller], cache[teller]
        valid: mx.array | None = None
        if history is not None:
            valid = history[:, history.shape[1] - T :]
        elif mixer.keeps_positions:
            valid = mixer.padding(inputs, first)
        if history is None or mixer.keeps_positions:
            seen = mixer.tokens_seen(first, B)
        else:
            seen = history[:, : history.shape[1] - T].astype(mx.int32).sum(axis=1)
        if valid is None:
            positions, added = mx.arange(T), mx.array(T)
        else:
            count = mx.cumsum(valid.astype(mx.int32), axis=1)
            positions, added = count - 1, count[:, -1]
        places = seen[:, None] + positions
        rotations = {name: rotary.at(places) for name, rotary in self._rotaries.items()}
        return Context(
            rotations={**rotations, "none": unrotated},
            mask=valid,
            seen=seen,
            positions_after=(seen + added).astype(mx.int32),
            history=history,
            length=T,
        )

    def make_cache(self, *, bounded: bool = True) -> list[Any]:
        """An empty cache of mlx-lm's own classes for each layer.

        A sliding softmax layer keeps its window only, or everything if not ``bounded``.
        """
        return [mixer.make_cache(bounded=bounded) for mixer in self.mixers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Weights as they stand in a file, without a tied head's copy, and experts stacked."""
        if self.spec.tie_word_embeddings:
            weights = {name: w for name, w in weights.items() if name != "lm_head.weight"}
        return dict(stacked(weights.items(), self.spec))

    @property
    def quant_predicate(self) -> Callable[[str, nn.Module], bool]:
        """Which modules mlx-lm's converter may quantise: routers, small as they are, stay exact."""
        return lambda path, module: not path.endswith(ROUTER)

    @property
    def cast_predicate(self) -> Callable[[str], bool]:
        """Which parameters mlx-lm's converter may store in a shorter type."""
        return lambda name: not name.endswith(FLOAT32_SUFFIXES)
