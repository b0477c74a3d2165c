"""Experts as mlx-lm's own converter stores them: one tensor for all of a layer's matrices.

``mlp.switch_mlp.up_proj.weight`` (count, out, in) holds what the canonical layout has in as many
tensors, ``mlp.experts.0.up_proj.weight`` and so on; ``scales`` and ``biases`` likewise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from supra_core.layout import layer_prefix
from supra_core.spec import ModelSpec
from supra_core.tensors import Array, LazyTensor

_EXPERT = re.compile(r"\.experts\.\d+\.")
_STACK = ".switch_mlp."
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
                prefix = f"{layer_prefix(index)}mlp"
                name = f"{prefix}{_STACK}{module}.{part}"
                tensor = tensors.get(name)
                if tensor is None or tensor.shape[:1] != (spec.experts.count,):
                    continue
                del single[name]
                for expert in range(spec.experts.count):
                    single[f"{prefix}.experts.{expert}.{module}.{part}"] = _one(tensor, expert)
    return single


def stacked_name(name: str) -> str:
    """What mlx-lm calls an expert's module, which it has in common with the layer's others."""
    return _EXPERT.sub(_STACK, name)


def _one(tensor: LazyTensor, index: int) -> LazyTensor:
    def read() -> Array:
        return np.asarray(tensor.rows(index, index + 1)[0])

    return LazyTensor(tensor.shape[1:], tensor.dtype, read)
