"""Softmax attention: the transformer's mixer, on mlx-lm's attention and its caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache, RotatingKVCache

from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.spec import ModelSpec
from supra_mlx.mixers.base import Context, Entry, MixerModule
from supra_mlx.numbered import fill_numbered, numbered

_NAMES = ("keys", "values")


class SoftmaxMixer(MixerModule):
    """The transformer's attention, over all tokens or a sliding window."""

    def __init__(self, spec: ModelSpec, mixer: SoftmaxAttention) -> None:
        super().__init__(spec, mixer)
        self._scale = spec.head_dim**-0.5
        self._window, self._rope = mixer.window, mixer.rotary
        self._softcap = spec.attention_softcap

    def __call__(self, x: mx.array, cache: Any, context: Context) -> mx.array:
        B, T, _ = x.shape
        q, k, v = self.queries_keys_values(x)
        rotate = context.rotations[self._rope]
        q, k, v = (z.transpose(0, 2, 1, 3) for z in (rotate(q), rotate(k), v))
        mask = context.shared((SoftmaxMixer, self._window), lambda: self._mask(cache, context))
        k, v = cache.update_and_fetch(k, v)
        if self._softcap is None:
            out = scaled_dot_product_attention(q, k, v, cache, scale=self._scale, mask=mask)
        else:
            out = capped_attention(q, k, v, self._scale, mask, self._softcap)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, T, -1))

    def _mask(self, cache: Any, context: Context) -> Any:
        """What mlx's attention takes as its mask."""
        if context.history is not None:
            return _history_mask(context.history, context.length, self._window)
        return cache.make_mask(context.length, return_array=False, window_size=self._window)

    def make_cache(self, *, bounded: bool) -> KVCache | RotatingKVCache:
        if self._window is None or not bounded:
            return KVCache()
        return RotatingKVCache(max_size=self._window)

    def entries(self, cache: Any) -> Iterator[tuple[str, Entry]]:
        if isinstance(cache, KVCache):
            return zip(_NAMES, cache.keys_and_values(), strict=True)
        return numbered(cache)

    def restore(self, cache: Any, read: Callable[[str], Entry]) -> None:
        if isinstance(cache, KVCache):
            keys, values = (read(name) for name in _NAMES)
            cache.state = keys, values, keys.shape[2]
        else:
            fill_numbered(cache, [read(str(place)) for place in range(len(cache.state))])


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


def capped_attention(
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
