"""The model of any spec, by mlx-lm's protocol: ``Model(ModelArgs.from_dict(config))``.

Parameters carry the names of :mod:`supra_core.model.layout`. Nothing is evaluated in here, so that
mlx-lm's generator can run ahead of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.base import BaseModelArgs, create_ssm_mask, scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache

from supra_core.artifact.config import config_to_spec
from supra_core.mixers import Mixer
from supra_core.mixers.decay import slopes
from supra_core.mixers.linear import LinearAttention
from supra_core.mixers.parts import (
    FeatureMap,
    GroupNorm,
    LearnedDecay,
    Norm,
    Projection,
    SumNormaliser,
)
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.layout import FLOAT32_SUFFIXES
from supra_core.model.spec import LayerSpec, ModelSpec
from supra_mlx.feed_forward import ROUTER, feed_forward, stacked
from supra_mlx.ops import linear_attention
from supra_mlx.rotary import Rotary, Rotate, unrotated
from supra_mlx.window import WindowMemory, windowed_attention

Shapes = dict[str, tuple[int, ...]]

# Slots of a linear layer's ArraysCache; windowed layers use all of them.
LINEAR_SLOTS = ("state", "positions", "keys", "values", "features")


@dataclass
class ModelArgs(BaseModelArgs):
    """What mlx-lm builds a model from: here a spec."""

    spec: ModelSpec
    model_type: str = "supra"

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> ModelArgs:
        """From a folder's config.json; raises SpecError when it does not describe a model."""
        return cls(spec=config_to_spec(params, "config.json"))


@dataclass
class _Context:
    """What all layers of one forward pass share."""

    rotations: dict[str, Rotate]  # by the names that mixers have for them
    mask: mx.array | None  # (B, T) valid new tokens, for linear layers
    seen: mx.array  # (B,) int32 tokens before this pass
    positions_after: mx.array  # (B,) int32 tokens seen after it
    history: mx.array | None  # (B, S) valid cached and new tokens, for softmax layers
    length: int
    softmax_masks: dict[int | None, Any] = field(default_factory=dict)

    def softmax_mask(self, window: int | None, cache: Any) -> Any:
        """What mlx's attention takes as its mask; layers of the same window share one."""
        if window not in self.softmax_masks:
            if self.history is None:
                made = cache.make_mask(self.length, return_array=False, window_size=window)
            else:
                made = _history_mask(self.history, self.length, window)
            self.softmax_masks[window] = made
        return self.softmax_masks[window]


def _history_mask(valid: mx.array, length: int, window: int | None) -> mx.array:
    """(B, 1, T, S): which of S tokens the last T may see, distances counted in valid tokens.

    Padding sees itself: a row without any key would be 0 / 0 and spoil later layers' values.
    """
    S = valid.shape[1]
    slots = mx.arange(S)
    mine = slots[S - length :, None]
    seen = (slots <= mine) & valid[:, None, :]
    if window is not None:
        age = mx.cumsum(valid.astype(mx.int32), axis=1)
        seen = seen & (age[:, S - length :, None] - age[:, None, :] < window)
    return (seen | (slots == mine))[:, None]


def _capped_attention(
    q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any, cap: float
) -> mx.array:
    """Attention of q (B, H, T, d) to k, v (B, K, S, ·), scores x being cap tanh(x / cap)."""
    B, H, T, d = q.shape
    K, S = k.shape[1:3]
    grouped = q.reshape(B, K, H // K, T, d)
    scores = (grouped @ k[:, :, None].swapaxes(-1, -2)).astype(mx.float32) * (scale / cap)
    scores = cap * mx.tanh(scores)
    if isinstance(mask, str):
        mask = mx.arange(S) <= mx.arange(S - T, S)[:, None]
    if mask is not None:
        # A mask by rows has a dimension of heads, which are two here.
        seen = mask if mask.ndim < 4 else mask[:, :, None]
        scores = mx.where(seen, scores, mx.array(-mx.inf))
    weights = mx.softmax(scores, axis=-1, precise=True).astype(v.dtype)
    return (weights @ v[:, :, None]).reshape(B, H, T, -1)


class _Projections(nn.Module):
    """q, k, v and o, and what a family puts behind them."""

    def __init__(self, spec: ModelSpec, mixer: Mixer) -> None:
        super().__init__()
        shapes = mixer.tensors(spec)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            out, into = shapes[f"{name}.weight"]
            setattr(self, name, nn.Linear(into, out, bias=f"{name}.bias" in shapes))
        for name in ("q_proj_norm", "k_proj_norm"):
            if f"{name}.weight" in shapes:
                setattr(self, name, _norm(spec, shapes[f"{name}.weight"][0]))
        self._heads, self._kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        self._norms_heads = spec.query_key_norm == "per_head"
        self._query_scale = 1.0 if mixer.folded else spec.query_scale

    def _queries_keys_values(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """(B, T, D) -> (B, T, H, ·), (B, T, K, ·), (B, T, K, Dv)."""
        B, T, _ = x.shape
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        normed = "q_proj_norm" in self
        if normed and not self._norms_heads:
            q, k = self.q_proj_norm(q), self.k_proj_norm(k)
        q = q.reshape(B, T, self._heads, -1)
        k, v = (z.reshape(B, T, self._kv_heads, -1) for z in (k, v))
        if normed and self._norms_heads:
            q, k = self.q_proj_norm(q), self.k_proj_norm(k)
        return q if self._query_scale == 1.0 else q * self._query_scale, k, v


class SoftmaxMixer(_Projections):
    """The transformer's attention, over all tokens or a sliding window."""

    def __init__(self, spec: ModelSpec, mixer: SoftmaxAttention) -> None:
        super().__init__(spec, mixer)
        self._scale = spec.head_dim**-0.5
        self._window, self._rope = mixer.window, mixer.rotary
        self._softcap = spec.attention_softcap

    def __call__(self, x: mx.array, cache: Any, context: _Context) -> mx.array:
        """(B, T, D) -> (B, T, D)."""
        B, T, _ = x.shape
        q, k, v = self._queries_keys_values(x)
        rotate = context.rotations[self._rope]
        q, k, v = (z.transpose(0, 2, 1, 3) for z in (rotate(q), rotate(k), v))
        mask = context.softmax_mask(self._window, cache)
        k, v = cache.update_and_fetch(k, v)
        if self._softcap is None:
            out = scaled_dot_product_attention(q, k, v, cache, scale=self._scale, mask=mask)
        else:
            out = _capped_attention(q, k, v, self._scale, mask, self._softcap)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, T, -1))


class PerHeadLinear(nn.Module):
    """One linear map a head: weight (heads, out, in), bias (heads, out)."""

    def __init__(self, shape: tuple[int, ...], bias: bool) -> None:
        super().__init__()
        self.weight = mx.zeros(shape)
        if bias:
            self.bias = mx.zeros(shape[:2])

    def __call__(self, x: mx.array) -> mx.array:
        """(B, T, heads, in) -> (B, T, heads, out)."""
        out = (x.transpose(0, 2, 1, 3) @ self.weight.swapaxes(-1, -2)).transpose(0, 2, 1, 3)
        return out + self.bias if "bias" in self else out


class LinearMixer(_Projections):
    """Linear attention with every choice of :class:`~supra_core.model.spec.LinearAttention`."""

    def __init__(self, spec: ModelSpec, mixer: LinearAttention) -> None:
        super().__init__(spec, mixer)
        shapes = mixer.tensors(spec)
        for name in ("q_feature", "k_feature"):
            if f"{name}.weight" in shapes:
                setattr(self, name, _feature_projection(shapes, name, mixer.feature_map))
        for name in ("q_norm", "k_norm"):
            if f"{name}.weight" in shapes:
                setattr(self, name, _norm(spec, shapes[f"{name}.weight"][0]))
        for name in ("log_slope", "gain", "log_far_gain", "log_sink"):
            if name in shapes:
                setattr(self, name, mx.zeros(shapes[name]))
        self._spec, self._mixer = spec, mixer
        if not isinstance(mixer.decay, LearnedDecay):
            fixed = np.exp(-slopes(mixer.decay, spec.num_attention_heads))
            self._fixed_decay = mx.array(fixed.astype(np.float32))

    def __call__(self, x: mx.array, cache: ArraysCache, context: _Context) -> mx.array:
        """(B, T, D) -> (B, T, D)."""
        spec, mixer = self._spec, self._mixer
        B, T, _ = x.shape
        q, k, v = self._queries_keys_values(x)
        rotate, H = context.rotations[mixer.rotary], spec.num_attention_heads
        z = self._projected(q, k, rotate)
        phi = _activate(mixer.feature_map.activation, z)
        z_q, z_k, phi_q, phi_k = z[:, :, :H], z[:, :, H:], phi[:, :, :H], phi[:, :, H:]
        if mixer.qk_norm:
            phi_q, phi_k, v = self._qk_norm(phi_q, phi_k, v)
        if mixer.rope_position == "after":
            phi_q, phi_k = rotate(phi_q), rotate(phi_k)
        if mixer.key_scale != 1.0:
            phi_k = phi_k * mixer.key_scale
        log_sink = self.log_sink if "log_sink" in self else None
        if mixer.window is None:
            out, cache[0] = linear_attention(
                phi_q, phi_k, v, self._decay(),
                initial_state=cache[0], mask=context.mask,
                normaliser="sum" if isinstance(mixer.normaliser, SumNormaliser) else None,
                sink=None if log_sink is None else mx.exp(log_sink),
            )  # fmt: skip
        else:
            buffers: list[Any] = cache.cache[2:]
            memory = None if cache[0] is None else WindowMemory(cache[0], *buffers)
            out, memory = windowed_attention(
                z_q, z_k, v, phi_q, phi_k, self._decay(), self.log_far_gain,
                mixer.window, log_sink=log_sink, memory=memory, seen=context.seen,
                mask=context.mask,
            )  # fmt: skip
            for slot, array in zip((0, 2, 3, 4), memory, strict=True):
                cache[slot] = array
        cache[1] = context.positions_after
        if isinstance(mixer.normaliser, GroupNorm):
            out = mx.fast.layer_norm(out, None, None, mixer.normaliser.eps)
        if mixer.gain != "none":
            out = out * (self.gain[:, None] if mixer.gain == "per_head" else self.gain)
        return self.o_proj(out.reshape(B, T, -1).astype(x.dtype))

    def _projected(self, q: mx.array, k: mx.array, rotate: Rotate) -> mx.array:
        """What the activation receives, (B, T, H + K, size): queries, then keys.

        Together they take half the operations, of which a decode step has too many.
        """
        phi, rope = self._mixer.feature_map, self._mixer.rope_position
        if rope == "before":
            q, k = rotate(q), rotate(k)
        if isinstance(phi.projection, Projection):
            q = self._feature(q, "q_feature")
            k = self._feature(k, "q_feature" if phi.projection.shared else "k_feature")
        z = mx.concatenate([q, k], axis=2)
        return rotate(z) if rope == "between" else z

    def _feature(self, z: mx.array, name: str) -> mx.array:
        """A feature map's learned part, (B, T, heads, d) -> (B, T, heads, size)."""
        phi = self._mixer.feature_map
        assert isinstance(phi.projection, Projection)
        if phi.projection.scope == "all_heads":
            return self[name](z.flatten(2)).reshape(*z.shape[:3], phi.size)
        return self[name](z)

    def _qk_norm(
        self, q: mx.array, k: mx.array, v: mx.array
    ) -> tuple[mx.array, mx.array, mx.array]:
        # The norm's weight differs between the query heads of a group: k has to be repeated.
        k, v = (mx.repeat(x, self._spec.group_size, axis=2) for x in (k, v))
        q = self.q_norm(q.flatten(2)).reshape(q.shape)
        return q, self.k_norm(k.flatten(2)).reshape(k.shape), v

    def _decay(self) -> mx.array:
        """gamma (H,), float32."""
        if isinstance(self._mixer.decay, LearnedDecay):
            return mx.exp(-mx.exp(self.log_slope.astype(mx.float32)))
        return self._fixed_decay


class Block(nn.Module):
    """A residual block."""

    def __init__(self, spec: ModelSpec, layer: LayerSpec) -> None:
        super().__init__()
        mixer = layer.mixer
        before, after = spec.block_norm != "after", spec.block_norm != "before"
        self._residual_scale = spec.residual_scale
        names = (("input_layernorm", before), ("mixer_output_norm", after),
                 ("post_attention_layernorm", before), ("mlp_output_norm", after))  # fmt: skip
        for name, present in names:
            if present:
                setattr(self, name, _norm(spec, spec.hidden_size))
        if isinstance(mixer, LinearAttention):
            self.self_attn = LinearMixer(spec, mixer)
        else:
            assert isinstance(mixer, SoftmaxAttention)
            self.self_attn = SoftmaxMixer(spec, mixer)
        self.mlp = feed_forward(spec, layer)

    def __call__(self, h: mx.array, cache: Any, context: _Context) -> mx.array:
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
            self.embed_norm = _norm(spec, spec.hidden_size)
        self.layers = [Block(spec, layer) for layer in spec.layers]
        self.norm = _norm(spec, spec.hidden_size)

    def __call__(self, inputs: mx.array, cache: list[Any], context: _Context) -> mx.array:
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
        self._linear = [
            index
            for index, layer in enumerate(args.spec.layers)
            if isinstance(layer.mixer, LinearAttention)
        ]

    @property
    def spec(self) -> ModelSpec:
        """What this model is."""
        return self.args.spec

    @property
    def layers(self) -> list[Block]:
        """The blocks, in order."""
        return self.model.layers

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
        if self._linear:
            # Every layer's padding is the same: only the first linear layer's is kept up to
            # date, because lazy updates that nobody reads pile up.
            cache[self._linear[0]].advance(inputs.shape[1])
        if self.spec.tie_word_embeddings:
            logits = self.model.embed_tokens.as_linear(h)
        else:
            logits = self.lm_head(h)
        cap = self.spec.logits_softcap
        return logits if cap is None else cap * mx.tanh(logits / cap)

    def _context(self, inputs: mx.array, cache: list[Any], history: mx.array | None) -> _Context:
        T = inputs.shape[1]
        first = cache[self._linear[0]] if self._linear else None
        valid: mx.array | None = None
        if history is not None:
            valid = history[:, history.shape[1] - T :]
        elif first is not None:
            valid = create_ssm_mask(inputs, first)
        seen = self._tokens_seen(inputs, cache, history)
        if valid is None:
            positions, added = mx.arange(T), mx.array(T)
        else:
            count = mx.cumsum(valid.astype(mx.int32), axis=1)
            positions, added = count - 1, count[:, -1]
        places = seen[:, None] + positions
        rotations = {name: rotary.at(places) for name, rotary in self._rotaries.items()}
        return _Context(
            rotations={**rotations, "none": unrotated},
            mask=valid,
            seen=seen,
            positions_after=(seen + added).astype(mx.int32),
            history=history,
            length=T,
        )

    def _tokens_seen(
        self, inputs: mx.array, cache: list[Any], history: mx.array | None
    ) -> mx.array:
        """(B,) int32: the position of each row's next token."""
        B, T = inputs.shape
        if self._linear:
            before: mx.array | None = cache[self._linear[0]][1]
            return mx.zeros((B,), dtype=mx.int32) if before is None else before
        if history is not None:
            return history[:, : history.shape[1] - T].astype(mx.int32).sum(axis=1)
        return mx.broadcast_to(mx.array(cache[0].offset, dtype=mx.int32), (B,))

    def make_cache(self, *, bounded: bool = True) -> list[Any]:
        """An empty cache of mlx-lm's own classes for each layer.

        A sliding softmax layer keeps its window only, or everything if not ``bounded``.
        """
        caches: list[Any] = []
        for layer in self.spec.layers:
            mixer = layer.mixer
            if isinstance(mixer, LinearAttention):
                caches.append(ArraysCache(2 if mixer.window is None else len(LINEAR_SLOTS)))
            elif mixer.window is not None and bounded:
                caches.append(RotatingKVCache(max_size=mixer.window))
            else:
                caches.append(KVCache())
        return caches

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


def _feature_projection(shapes: Shapes, name: str, phi: FeatureMap) -> nn.Module:
    shape, bias = shapes[f"{name}.weight"], f"{name}.bias" in shapes
    assert isinstance(phi.projection, Projection)
    if phi.projection.scope == "all_heads":
        return nn.Linear(shape[1], shape[0], bias=bias)
    return PerHeadLinear(shape, bias)


def _norm(spec: ModelSpec, size: int) -> nn.Module:
    if spec.norm.weight_offset:
        return _OffsetNorm(spec.norm, size)
    if spec.norm.kind == "layer_norm":
        return nn.LayerNorm(size, eps=spec.norm.eps, bias=False)
    return nn.RMSNorm(size, eps=spec.norm.eps)


class _OffsetNorm(nn.Module):
    """A norm whose gain is its weight plus a constant, added in float32."""

    def __init__(self, norm: Norm, size: int) -> None:
        super().__init__()
        self.weight = mx.zeros((size,))
        self._spec = norm

    def __call__(self, x: mx.array) -> mx.array:
        """(..., size) -> (..., size)."""
        norm = self._spec
        gain = self.weight.astype(mx.float32) + norm.weight_offset
        exact = x.astype(mx.float32)
        if norm.kind == "layer_norm":
            return mx.fast.layer_norm(exact, gain, None, norm.eps).astype(x.dtype)
        return mx.fast.rms_norm(exact, gain, norm.eps).astype(x.dtype)


def _activate(activation: str, z: mx.array) -> mx.array:
    if activation == "relu":
        return mx.maximum(z, 0.0)
    if activation == "signed_relu":
        return mx.concatenate([mx.maximum(z, 0.0), mx.maximum(-z, 0.0)], axis=-1)
    if activation == "signed_softmax":
        return mx.concatenate([mx.softmax(s, axis=-1, precise=True) for s in (z, -z)], axis=-1)
    return z
