"""Softmax over a window with sinks, whose cache is a ring of fixed size."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import ArraysCache

from supra_core.mixers.window import WindowAttention
from supra_core.model.spec import ModelSpec
from supra_mlx.mixers.base import ArraysMixer, Context
from supra_mlx.mixers.softmax import capped_attention


class WindowMixer(ArraysMixer):
    """The transformer's attention to the first ``sinks`` tokens and the last ``window``.

    Its keys and values (B, K, sinks + window, d) hold a row's token n at slot n or, if it is not a
    sink, at sinks + (n - sinks) mod window.
    """

    slots = ("keys", "positions", "values")

    def __init__(self, spec: ModelSpec, mixer: WindowAttention) -> None:
        super().__init__(spec, mixer)
        self._scale = spec.head_dim**-0.5
        self._window, self._sinks, self._rotary = mixer.window, mixer.sinks, mixer.rotary
        self._softcap = spec.attention_softcap

    def __call__(self, x: mx.array, cache: ArraysCache, context: Context) -> mx.array:
        B, T, _ = x.shape
        q, k, v = self.queries_keys_values(x)
        rotate = context.rotations[self._rotary]
        q, k, v = (z.transpose(0, 2, 1, 3) for z in (rotate(q), rotate(k), v))
        key = (WindowMixer, self._window, self._sinks)
        mask, kept = context.shared(key, lambda: self._seen_and_kept(B, T, context))
        if cache[0] is None:
            ring = (B, k.shape[1], self._sinks + self._window)
            cache[0], cache[2] = (mx.zeros((*ring, z.shape[-1]), dtype=z.dtype) for z in (k, v))
        k, v = (
            mx.concatenate([old.astype(new.dtype), new], axis=2)
            for old, new in ((cache[0], k), (cache[2], v))
        )
        cache[0], cache[2] = (mx.take_along_axis(z, kept, axis=2) for z in (k, v))
        cache[1] = context.positions_after
        if self._softcap is None:
            out = scaled_dot_product_attention(q, k, v, cache, scale=self._scale, mask=mask)
        else:
            out = capped_attention(q, k, v, self._scale, mask, self._softcap)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(B, T, -1))

    def _places(self, tokens: mx.array) -> mx.array:
        """(B, sinks + window): the token in each slot of a row that has seen ``tokens`` (B,).

        Below 0 for a slot that is empty.
        """
        n, W = self._sinks, self._window
        last, slots = tokens[:, None] - 1 - n, mx.arange(W)
        # The newest token of each slot; before the first, those of a ring that is not full.
        ring = last - (last - slots) % W
        sinks = mx.broadcast_to(mx.arange(n), (len(tokens), n))
        return mx.concatenate(
            [mx.where(sinks < tokens[:, None], sinks, -1), mx.where(ring >= 0, ring + n, -1)], 1
        )

    def _seen_and_kept(self, B: int, T: int, context: Context) -> tuple[mx.array, mx.array]:
        """The mask (B, 1, T, S) over the ring and T new tokens, and the slots (B, 1, ., 1) among
        those S that the ring takes over."""
        n, W = self._sinks, self._window
        new = mx.ones((B, T), dtype=mx.bool_) if context.mask is None else context.mask
        own = context.seen[:, None] + mx.cumsum(new.astype(mx.int32), axis=1) - 1
        places = mx.concatenate([self._places(context.seen), mx.where(new, own, -1)], axis=1)
        age = own[:, :, None] - places[:, None]
        seen = (age >= 0) & (places >= 0)[:, None] & ((age < W) | (places < n)[:, None])
        # Padding sees itself: a row without any key would be 0 / 0.
        itself = mx.arange(n + W + T) == mx.arange(T)[:, None] + n + W
        # The new tokens of a row in order, padding behind them.
        order = mx.argsort(mx.where(new, 0, T) + mx.arange(T), axis=1)
        after = self._places(context.positions_after)
        fresh = after - context.seen[:, None]
        came = mx.take_along_axis(order, mx.clip(fresh, 0, T - 1), axis=1)
        kept = mx.where(fresh >= 0, came + n + W, mx.arange(n + W))
        return (seen | itself)[:, None], kept[:, None, :, None]
