"""A windowed model taken apart: what stands behind its window alone, and its window alone.

Each is another spec with other tensors, so that every backend and every measurement takes it like
any model.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from supra_core.errors import SpecError
from supra_core.mixers import Mixer
from supra_core.mixers.base import Float64, Weight
from supra_core.model.layout import layer_prefix, tensor_shapes
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor, TensorSource


def is_windowed(spec: ModelSpec) -> bool:
    """Whether any layer joins a window with a state for the tokens before it."""
    return any(mixer.joins_window for mixer in spec.mixers)


def without_window(
    spec: ModelSpec, tensors: TensorSource
) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """The states alone: they hold the tokens inside the window too.

    Raises :class:`SpecError` for a model without a window.
    """
    return _taken_apart(spec, tensors, lambda mixer, weight: mixer.without_window(spec, weight))


def window_alone(spec: ModelSpec, tensors: TensorSource) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """Softmax attention over the window, and nothing of what is older, the sink included.

    Raises :class:`SpecError` for a model without a window.
    """
    return _taken_apart(spec, tensors, lambda mixer, weight: mixer.window_alone(spec, weight))


def _taken_apart(
    spec: ModelSpec,
    tensors: TensorSource,
    part: Callable[[Mixer, Weight], tuple[Mixer, dict[str, Float64]]],
) -> tuple[ModelSpec, dict[str, LazyTensor]]:
    """The model with ``part`` of each mixer that joins a window with a state."""
    if not is_windowed(spec):
        raise SpecError("no layer of the model has linear attention with a window to take away")
    mixers, new = list(spec.mixers), dict(tensors)
    for index, mixer in enumerate(mixers):
        if mixer.joins_window:
            prefix = layer_prefix(index) + "self_attn."

            def weight(name: str, prefix: str = prefix) -> Float64 | None:
                tensor = tensors.get(prefix + name)
                return None if tensor is None else tensor.read().astype(np.float64)

            mixers[index], changed = part(mixer, weight)
            for name, array in changed.items():
                new[prefix + name] = LazyTensor.of(array.astype(np.float32))
    alone = spec.with_mixers(mixers)
    return alone, {name: new[name] for name in tensor_shapes(alone)}
