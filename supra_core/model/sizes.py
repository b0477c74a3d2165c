"""What a model keeps in memory: parameters, recurrent state, and the KV cache it replaces.

All sizes are for one sequence. The state of linear attention is float32 in every backend; keys
and values are counted in ``cache_itemsize`` bytes an element, 2 for the usual 16-bit types.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from supra_core.mixers import Mixer
from supra_core.mixers.base import CACHE_ITEMSIZE, kv_bytes_per_token
from supra_core.model.layout import active_parameter_count, parameter_count
from supra_core.model.original import original_spec
from supra_core.model.spec import ModelSpec
from supra_core.tensors import TensorSource


@dataclass(frozen=True)
class SequenceMemory:
    """A sequence's state and caches, in bytes, by its context.

    ``unkept``: how many of the tokens that fill a cache a backend drops before the next comes.
    """

    spec: ModelSpec
    cache_itemsize: int
    unkept: int = 0

    def __call__(self, context: int) -> int:
        """The bytes after ``context`` tokens."""
        return sum(
            mixer.state_bytes(self.spec, self.cache_itemsize, min(context, most))
            for mixer, most in self._mixers(unlimited=context)
        )

    @property
    def fixed(self) -> int:
        """The most that does not grow with the context: states, and caches that are full."""
        return sum(
            mixer.state_bytes(self.spec, self.cache_itemsize, most)
            for mixer, most in self._mixers(unlimited=0)
        )

    @property
    def windows(self) -> tuple[int, ...]:
        """The contexts at which a layer's cache is full."""
        found = (mixer.fills_at for mixer in self.spec.mixers)
        return tuple(window for window in found if window is not None)

    def _mixers(self, unlimited: int) -> Iterator[tuple[Mixer, int]]:
        """Each mixer, and the context after which its memory is the same."""
        for mixer in self.spec.mixers:
            full = mixer.fills_at
            yield mixer, unlimited if full is None else full - self.unkept


@dataclass(frozen=True)
class Sizes:
    """``active_parameters``: those that a token goes through, which differ with experts alone.

    ``state_bytes`` is the most that is fixed: recurrent states, and windows that are full;
    ``growing_bytes_per_token`` is what layers add that keep every token.

    ``kv_bytes_per_token``: the transformer's with the same heads, for a token that all its layers
    hold, and ``layer_kv_bytes_per_token`` for one of them; ``transformer_windows``: those of its
    layers that hold the last tokens only.
    ``break_even_tokens``: the context from which on the model's memory is never the greater one;
    None if there is none, or no layer is another than the transformer's.
    ``step_weight_bytes``: what a decode step reads of the weights, and
    ``transformer_step_weight_bytes`` what it reads of the transformer's in the same type.
    """

    parameters: int
    active_parameters: int
    weight_bytes: int
    state_bytes: int
    growing_bytes_per_token: int
    layer_kv_bytes_per_token: int
    kv_bytes_per_token: int
    transformer_windows: tuple[int, ...]
    break_even_tokens: int | None
    step_weight_bytes: int
    transformer_step_weight_bytes: int
    memory_bytes: SequenceMemory
    transformer_memory_bytes: SequenceMemory

    def step_bytes(self, context: int) -> int:
        """What the next token moves after ``context``: weights read, state read and written.

        A device whose decode is bound by memory yields bandwidth over this tokens a second at
        most. The one key and value that a cache gains are left out.
        """
        written = self.memory_bytes(0)
        return self.step_weight_bytes + self.memory_bytes(context) + written

    def transformer_step_bytes(self, context: int) -> int:
        """The transformer's :meth:`step_bytes`, whose state is its KV cache, read once."""
        return self.transformer_step_weight_bytes + self.transformer_memory_bytes(context)


def measure(
    spec: ModelSpec,
    tensors: TensorSource,
    *,
    cache_itemsize: int = CACHE_ITEMSIZE,
    unkept: int = 0,
) -> Sizes:
    """The sizes of a model with these weights; ``unkept`` as in :class:`SequenceMemory`."""
    weights = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
    return of_spec(spec, weights, cache_itemsize=cache_itemsize, unkept=unkept)


def of_spec(
    spec: ModelSpec, weight_bytes: int, *, cache_itemsize: int = CACHE_ITEMSIZE, unkept: int = 0
) -> Sizes:
    """The sizes of a model whose weights take so many bytes."""
    transformer, parameters = original_spec(spec), parameter_count(spec)
    per_layer = kv_bytes_per_token(spec, cache_itemsize)
    memory = SequenceMemory(spec, cache_itemsize, unkept)
    theirs = SequenceMemory(transformer, cache_itemsize)
    # Of an embedding that is no output head as well, a step reads one row.
    unread = 0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size
    itemsize = weight_bytes / parameters
    active = active_parameter_count(spec)
    full = max(memory.windows, default=0)
    return Sizes(
        parameters=parameters,
        active_parameters=active,
        weight_bytes=weight_bytes,
        state_bytes=memory.fixed,
        growing_bytes_per_token=memory(full + 1) - memory(full),
        layer_kv_bytes_per_token=per_layer,
        kv_bytes_per_token=per_layer * spec.num_hidden_layers,
        transformer_windows=theirs.windows,
        break_even_tokens=_break_even(SequenceMemory(spec, cache_itemsize), theirs),
        step_weight_bytes=round((active - unread) * itemsize),
        transformer_step_weight_bytes=round(
            (active_parameter_count(transformer) - unread) * itemsize
        ),
        memory_bytes=memory,
        transformer_memory_bytes=theirs,
    )


def _break_even(ours: SequenceMemory, theirs: SequenceMemory) -> int | None:
    """The context from which on ``ours`` is never more than ``theirs``; None if it stays more.

    Between the contexts at which caches are full the difference is linear.
    """
    if ours.spec.layers == theirs.spec.layers:
        return None

    def excess(context: int) -> int:
        return ours(context) - theirs(context)

    points = sorted({0, *ours.windows, *theirs.windows})
    last = points[-1]
    # As far as the last slope has to reach: it changes by whole bytes a token.
    points.append(last + max(excess(last), 0) + 1)
    if excess(points[-1]) > 0 or excess(last + 1) > excess(last):
        return None
    for first, second in reversed(list(pairwise(points))):
        before, after = excess(first), excess(second)
        if before > 0:
            return first - (-before * (second - first) // (before - after))
    return 0
