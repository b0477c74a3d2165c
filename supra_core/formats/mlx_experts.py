"""Experts as mlx-lm's converter stores them: one tensor for all experts of a layer.

``mlp.switch_mlp.up_proj.weight`` (count, out, in) holds the canonical layout's ``count`` tensors,
``mlp.experts.0.up_proj.weight`` and so on; ``scales`` and ``biases`` likewise.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np

from supra_core.model.layout import layer_prefix, stacked_name
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor

_MODULES = ("gate_proj", "up_proj", "down_proj")
_PARTS = ("weight", "scales", "biases")


def unstacked(spec: ModelSpec, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The same tensors with a separate one for each expert.

    A tensor of another shape keeps its name, and the check of names reports it.
    """
    single = dict(tensors)
    if spec.experts is None:
        return single
    for index, layer in enumerate(spec.layers):
        if layer.feed_forward != "experts":
            continue
        for module, part in product(_MODULES, _PARTS):
            names = [
                f"{layer_prefix(index)}mlp.experts.{expert}.{module}.{part}"
                for expert in range(spec.experts.count)
            ]
            tensor = tensors.get(stacked_name(names[0]))
            if tensor is not None and tensor.shape[:1] == (len(names),):
                del single[stacked_name(names[0])]
                single |= {name: _one(tensor, expert) for expert, name in enumerate(names)}
    return single


def _one(tensor: LazyTensor, index: int) -> LazyTensor:
    return LazyTensor(
        tensor.shape[1:], tensor.dtype, lambda: np.asarray(tensor.rows(index, index + 1)[0])
    )
