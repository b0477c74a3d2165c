"""Experts as mlx-lm's own converter stores them: one tensor for all of a layer's matrices.

``mlp.switch_mlp.up_proj.weight`` (count, out, in) holds what the canonical layout has in as many
tensors, ``mlp.experts.0.up_proj.weight`` and so on; ``scales`` and ``biases`` likewise.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from supra_core.model.layout import layer_prefix, stacked_name
from supra_core.model.spec import ModelSpec
from supra_core.tensors import Array, LazyTensor

_MODULES = ("gate_proj", "up_proj", "down_proj")
_PARTS = ("weight", "scales", "biases")


def unstacked(spec: ModelSpec, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The same tensors with one for each expert, which is read by itself.

    What has another shape keeps its name, under which it is listed when names are checked.
    """
    single = dict(tensors)
    if spec.experts is None:
        return single
    for index, layer in enumerate(spec.layers):
        if layer.feed_forward != "experts":
            continue
        for module in _MODULES:
            for part in _PARTS:
                names = [
                    f"{layer_prefix(index)}mlp.experts.{expert}.{module}.{part}"
                    for expert in range(spec.experts.count)
                ]
                tensor = tensors.get(stacked_name(names[0]))
                if tensor is None or tensor.shape[:1] != (len(names),):
                    continue
                del single[stacked_name(names[0])]
                single |= {name: _one(tensor, expert) for expert, name in enumerate(names)}
    return single


def _one(tensor: LazyTensor, index: int) -> LazyTensor:
    def read() -> Array:
        return np.asarray(tensor.rows(index, index + 1)[0])

    return LazyTensor(tensor.shape[1:], tensor.dtype, read)
