"""What a model keeps in memory: parameters, recurrent state, and the KV cache it replaces.

All sizes are for one sequence. The state of linear attention is float32 in every backend; keys
and values are counted in ``cache_itemsize`` bytes an element, 2 for the usual 16-bit types.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from supra_core.model.layout import active_parameter_count, parameter_count
from supra_core.model.original import original_spec
from supra_core.model.spec import LinearAttention, ModelSpec, SoftmaxAttention, SumNormaliser
from supra_core.tensors import TensorSource

STATE_ITEMSIZE = 4
CACHE_ITEMSIZE = 2


@dataclass(frozen=True)
class Sizes:
    """``active_parameters``: those that a token goes through, which differ with experts alone.

    ``state_bytes`` is the most that is fixed: recurrent states, and windows that are full;
    ``growing_bytes_per_token`` is what softmax layers without a window add. ``sliding_windows``:
    those of softmax layers, in tokens, each of which takes ``layer_kv_bytes_per_token`` a token.

    ``kv_bytes_per_token``: the transformer's with the same heads, for a token that all its layers
    hold; ``transformer_windows``: those of its layers that hold the last tokens only.
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
    sliding_windows: tuple[int, ...]
    layer_kv_bytes_per_token: int
    kv_bytes_per_token: int
    transformer_windows: tuple[int, ...]
    break_even_tokens: int | None
    step_weight_bytes: int
    transformer_step_weight_bytes: int

    def memory_bytes(self, context: int) -> int:
        """State and caches after ``context`` tokens.

        A sliding window holds no more tokens than there were. The window of a linear layer is
        there whole from the first one, as every backend allocates it.
        """
        return self._recurrent_bytes + self._cached_bytes(context)

    def step_bytes(self, context: int) -> int:
        """What the next token moves after ``context``: weights read, state read and written.

        A device whose decode is bound by memory yields bandwidth over this tokens a second at
        most. The one key and value that a cache gains are left out.
        """
        return self.step_weight_bytes + 2 * self._recurrent_bytes + self._cached_bytes(context)

    def transformer_step_bytes(self, context: int) -> int:
        """The transformer's :meth:`step_bytes`, whose state is its KV cache, read once."""
        return self.transformer_step_weight_bytes + self.transformer_memory_bytes(context)

    def transformer_memory_bytes(self, context: int) -> int:
        """The transformer's KV cache after ``context`` tokens."""
        dropped = sum(max(context - window, 0) for window in self.transformer_windows)
        return context * self.kv_bytes_per_token - dropped * self.layer_kv_bytes_per_token

    @property
    def _recurrent_bytes(self) -> int:
        """What linear layers keep."""
        return self.state_bytes - self.layer_kv_bytes_per_token * sum(self.sliding_windows)

    def _cached_bytes(self, context: int) -> int:
        """Keys and values of softmax layers after ``context`` tokens."""
        held = sum(min(window, context) for window in self.sliding_windows)
        return held * self.layer_kv_bytes_per_token + context * self.growing_bytes_per_token


def measure(
    spec: ModelSpec, tensors: TensorSource, *, cache_itemsize: int = CACHE_ITEMSIZE
) -> Sizes:
    """The sizes of a model with these weights."""
    weights = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors.values())
    return of_spec(spec, weights, cache_itemsize=cache_itemsize)


def of_spec(spec: ModelSpec, weight_bytes: int, *, cache_itemsize: int = CACHE_ITEMSIZE) -> Sizes:
    """The sizes of a model whose weights take so many bytes."""
    state = sum(mixer_state_bytes(spec, layer.mixer, cache_itemsize) for layer in spec.layers)
    per_layer = kv_bytes_per_token(spec, cache_itemsize)
    growing = per_layer * sum(mixer.window is None for mixer in _mixers(spec))
    sliding = _windows(spec)
    parameters = parameter_count(spec)
    transformer = original_spec(spec)
    # Of an embedding that is no output head as well, a step reads one row.
    unread = 0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size
    itemsize = weight_bytes / parameters
    active = active_parameter_count(spec)
    return Sizes(
        parameters=parameters,
        active_parameters=active,
        weight_bytes=weight_bytes,
        state_bytes=state,
        growing_bytes_per_token=growing,
        sliding_windows=sliding,
        layer_kv_bytes_per_token=per_layer,
        kv_bytes_per_token=per_layer * spec.num_hidden_layers,
        transformer_windows=_windows(transformer),
        break_even_tokens=_break_even(
            spec, transformer, state - per_layer * sum(sliding), per_layer
        ),
        step_weight_bytes=round((active - unread) * itemsize),
        transformer_step_weight_bytes=round(
            (active_parameter_count(transformer) - unread) * itemsize
        ),
    )


def _mixers(spec: ModelSpec) -> list[SoftmaxAttention]:
    """The softmax layers', in order: of a transformer all."""
    mixers = [layer.mixer for layer in spec.layers]
    return [mixer for mixer in mixers if isinstance(mixer, SoftmaxAttention)]


def _windows(spec: ModelSpec) -> tuple[int, ...]:
    """Those of the softmax layers that have one."""
    return tuple(mixer.window for mixer in _mixers(spec) if mixer.window is not None)


def _break_even(spec: ModelSpec, transformer: ModelSpec, fixed: int, per_layer: int) -> int | None:
    """From which context on the ``fixed`` bytes of the linear layers are no more than what the
    transformer caches in their place, ``per_layer`` bytes a token and layer; None if always more.

    After n tokens a window holds min(window, n), so that the cache is the least of some sums: the
    shortest windows counted as full and the others as growing, for every number of the shortest.
    All of these have to reach ``fixed``, and the last one to do so decides.
    """
    theirs = [
        mixer
        for layer, mixer in zip(spec.layers, _mixers(transformer), strict=True)
        if isinstance(layer.mixer, LinearAttention)
    ]
    windows = sorted(mixer.window for mixer in theirs if mixer.window is not None)
    found = []
    for full in range(len(windows) + 1):
        growing = len(theirs) - full
        missing = fixed - per_layer * sum(windows[:full])
        if growing:
            found.append(_quotient(missing, per_layer * growing))
        elif missing > 0:
            return None
    return max(found, default=None)


def _quotient(dividend: int, divisor: int) -> int:
    """Rounded up."""
    return -(-dividend // divisor)


def kv_bytes_per_token(spec: ModelSpec, cache_itemsize: int = CACHE_ITEMSIZE) -> int:
    """What one softmax layer caches for one token: a key and a value for each key/value head."""
    return spec.num_key_value_heads * (spec.head_dim + spec.value_head_dim) * cache_itemsize


def mixer_state_bytes(
    spec: ModelSpec,
    mixer: SoftmaxAttention | LinearAttention,
    cache_itemsize: int = CACHE_ITEMSIZE,
) -> int:
    """The fixed memory of one layer: recurrent state, and the buffer of a window."""
    if isinstance(mixer, SoftmaxAttention):
        return (mixer.window or 0) * kv_bytes_per_token(spec, cache_itemsize)
    features, window = mixer.feature_map.output_size, 0
    if mixer.window is not None:
        # A key leaves the window as features, which are kept beside it.
        channels = mixer.feature_map.size + spec.value_head_dim + features
        window = mixer.window * spec.num_key_value_heads * channels * cache_itemsize
    columns = spec.value_head_dim + isinstance(mixer.normaliser, SumNormaliser)
    return window + spec.num_attention_heads * features * columns * STATE_ITEMSIZE
