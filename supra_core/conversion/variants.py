"""A windowed model taken apart: its linear part alone, and its window alone.

Each is another spec with other tensors, so that every backend and every measurement takes it like
any model. The windowed mixer (``windowed_attention`` of the reference) weighs a token of age
a = t - j by exp(z_q . z_k / sqrt(size)) when a < W, and else by
far_gain gamma^(a - W) (phi(q) . phi(k)); the sink is added to the sum of all weights.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from supra_core.errors import SpecError
from supra_core.model.decay import slopes
from supra_core.model.layout import layer_prefix, tensor_shapes
from supra_core.model.spec import LinearAttention, ModelSpec, SumNormaliser
from supra_core.tensors import LazyTensor, TensorSource

# exp of it is 0 in every type, also relative to the smallest score that occurs; finite, since
# the difference of two infinities would be NaN.
LOG_OF_NOTHING = -1e4


def is_windowed(spec: ModelSpec) -> bool:
    """Whether any layer is linear attention with a window."""
    return bool(_windowed_layers(spec))


def without_window(
    spec: ModelSpec, tensors: TensorSource
) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """The linear part alone: tokens inside the window get linear weights too.

    far_gain gamma^-W is common to all weights and so goes into the sink, which it divides:
    log_sink - log_far_gain - W slope. Raises :class:`SpecError` for a model without a window.
    """
    layers = _checked(spec)
    mixers = [layer.mixer for layer in spec.layers]
    changed: dict[str, LazyTensor] = dict(tensors)
    for index, mixer in layers.items():
        mixers[index] = replace(mixer, window=None)
        if isinstance(mixer.normaliser, SumNormaliser) and mixer.normaliser.sink:
            name = f"{layer_prefix(index)}self_attn.log_sink"
            changed[name] = _sink_of_linear_part(spec, mixer, changed, index)
    linear = spec.with_mixers(mixers)
    return linear, {name: changed[name] for name in tensor_shapes(linear)}


def window_alone(spec: ModelSpec, tensors: TensorSource) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """Softmax attention over the window, and nothing of what is older, the sink included.

    Raises :class:`SpecError` for a model without a window.
    """
    changed: dict[str, LazyTensor] = dict(tensors)
    for index in _checked(spec):
        for name in ("log_far_gain", "log_sink"):
            full = f"{layer_prefix(index)}self_attn.{name}"
            if full in changed:
                nothing = np.full(changed[full].shape, LOG_OF_NOTHING, dtype=np.float32)
                changed[full] = LazyTensor.of(nothing)
    return spec, changed


def _checked(spec: ModelSpec) -> dict[int, LinearAttention]:
    layers = _windowed_layers(spec)
    if not layers:
        raise SpecError("no layer of the model has linear attention with a window to take away")
    return layers


def _windowed_layers(spec: ModelSpec) -> dict[int, LinearAttention]:
    """The mixers that have both parts, by layer."""
    return {
        index: layer.mixer
        for index, layer in enumerate(spec.layers)
        if isinstance(layer.mixer, LinearAttention) and layer.mixer.window is not None
    }


def _sink_of_linear_part(
    spec: ModelSpec, mixer: LinearAttention, tensors: TensorSource, index: int
) -> LazyTensor:
    """log_sink (H,) of the mixer without its window, computed in float64."""
    prefix = f"{layer_prefix(index)}self_attn."

    def stored(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return tensors[prefix + name].read().astype(np.float64)

    assert mixer.window is not None
    log_slope = stored("log_slope") if mixer.decay.kind == "learned" else None
    slope = slopes(mixer.decay, spec.num_attention_heads, log_slope)
    moved = stored("log_sink") - stored("log_far_gain") - mixer.window * slope
    return LazyTensor.of(moved.astype(np.float32))
