"""What every mixer answers in MLX: its forward pass, and all that is known of its cache.

A cache is of mlx-lm's own classes, which its batch generator and its cache files know. Code outside
this room asks the layer's mixer about it; it never asks which kind it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_ssm_mask
from mlx_lm.models.cache import ArraysCache

from supra_core.mixers import Mixer
from supra_core.model.spec import ModelSpec
from supra_mlx.norms import norm_module
from supra_mlx.rotary import Rotate

# An entry of a cache: an array, or a number.
Entry = Any
Made = TypeVar("Made")


@dataclass
class Context:
    """What all layers of one forward pass share."""

    rotations: dict[str, Rotate]  # by the names that mixers have for them
    mask: mx.array | None  # (B, T) valid new tokens, where they are known
    seen: mx.array  # (B,) int32 tokens before this pass
    positions_after: mx.array  # (B,) int32 tokens seen after it
    history: mx.array | None  # (B, S) valid cached and new tokens, if the caller gave them
    length: int
    _made: dict[Any, Any] = field(default_factory=dict)

    def shared(self, key: object, make: Callable[[], Made]) -> Made:
        """What layers of the same ``key`` share: made by the first of them."""
        if key not in self._made:
            self._made[key] = make()
        found: Made = self._made[key]
        return found


class MixerModule(nn.Module):
    """The base of all kinds: q, k, v and o, and what a family puts behind them.

    ``keeps_positions``: whether its cache holds how many tokens a row has seen, and its padding;
    if any layer's does, the first of them tells the model.
    ``finer_matrices``: those that quantising gives more bits.
    """

    keeps_positions: ClassVar[bool] = False
    finer_matrices: ClassVar[tuple[str, ...]] = ("v_proj",)

    def __init__(self, spec: ModelSpec, mixer: Mixer) -> None:
        super().__init__()
        shapes = mixer.tensors(spec)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            out, into = shapes[f"{name}.weight"]
            setattr(self, name, nn.Linear(into, out, bias=f"{name}.bias" in shapes))
        for name in ("q_proj_norm", "k_proj_norm"):
            if f"{name}.weight" in shapes:
                setattr(self, name, norm_module(spec.norm, shapes[f"{name}.weight"][0]))
        self._heads, self._kv_heads = spec.num_attention_heads, spec.num_key_value_heads
        self._norms_heads = spec.query_key_norm == "per_head"
        self._query_scale = 1.0 if mixer.folded else spec.query_scale

    def __call__(self, x: mx.array, cache: Any, context: Context) -> mx.array:
        """(B, T, D) -> (B, T, D); ``cache`` is updated."""
        raise NotImplementedError

    def queries_keys_values(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
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

    # --- its cache --------------------------------------------------------------------------

    def make_cache(self, *, bounded: bool) -> Any:
        """An empty cache; not ``bounded``: one that takes padding anywhere, and may keep more."""
        raise NotImplementedError

    def tokens_seen(self, cache: Any, batch: int) -> mx.array:
        """(B,) int32: the position of each row's next token."""
        return mx.broadcast_to(mx.array(cache.offset, dtype=mx.int32), (batch,))

    def padding(self, inputs: mx.array, cache: Any) -> mx.array | None:
        """(B, T) valid new tokens by the cache, which ``keeps_positions``; None if all are."""
        mask: mx.array | None = create_ssm_mask(inputs, cache)
        return mask

    def entries(self, cache: Any) -> Iterator[tuple[str, Entry]]:
        """What a cache that has seen a token holds, by the names that state files have."""
        raise NotImplementedError

    def restore(self, cache: Any, read: Callable[[str], Entry]) -> None:
        """The inverse of :meth:`entries`, into an empty cache."""
        raise NotImplementedError

    def lacks_zeros(self, cache: Any) -> bool:
        """Whether the cache needs :meth:`write_zeros` before it joins a batch."""
        return False

    def write_zeros(self, cache: Any, like: Any) -> None:
        """Zeros for what the cache leaves out before the first token, ``like`` one after it."""

    def own(self, cache: Any) -> None:
        """Give a cache that was taken from a batch arrays that do not share the batch's memory."""


class ArraysMixer(MixerModule):
    """Its cache is arrays of fixed size, named by ``slots``; the second is ``positions``."""

    keeps_positions = True
    slots: ClassVar[tuple[str, ...]]

    def make_cache(self, *, bounded: bool) -> ArraysCache:
        return ArraysCache(len(self.slots))

    def tokens_seen(self, cache: ArraysCache, batch: int) -> mx.array:
        before: mx.array | None = cache[1]
        return mx.zeros((batch,), dtype=mx.int32) if before is None else before

    def entries(self, cache: ArraysCache) -> Iterator[tuple[str, Entry]]:
        return zip(self.slots, cache.cache, strict=False)

    def restore(self, cache: ArraysCache, read: Callable[[str], Entry]) -> None:
        for slot in range(len(cache.cache)):
            cache[slot] = read(self.slots[slot])

    def lacks_zeros(self, cache: ArraysCache) -> bool:
        return bool(cache.empty())

    def write_zeros(self, cache: ArraysCache, like: ArraysCache) -> None:
        cache.cache = [mx.zeros_like(array) for array in like.cache]

    def own(self, cache: ArraysCache) -> None:
        if not cache.empty():
            cache.cache = [mx.contiguous(array) for array in cache.cache]
