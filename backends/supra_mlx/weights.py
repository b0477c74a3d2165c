"""Arrays between NumPy and MLX, and a loaded :class:`~supra_mlx.model.Model`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from supra_core.formats.mlx_quantized import Packed
from supra_core.model.layout import FLOAT32_SUFFIXES, check_tensors, stacked_name
from supra_core.model.spec import ModelSpec
from supra_core.sources.source import Source
from supra_core.tensors import BFLOAT16, LazyTensor, dtype_named
from supra_mlx.feed_forward import stacked
from supra_mlx.model import Model, ModelArgs


def to_mlx(array: npt.NDArray[Any]) -> mx.array:
    """A copy in MLX; bfloat16 goes by its bits, which neither library reads from the other."""
    if array.dtype == BFLOAT16:
        return mx.array(np.ascontiguousarray(array).view(np.uint16)).view(mx.bfloat16)
    return mx.array(array)


def to_numpy(array: mx.array) -> npt.NDArray[Any]:
    """A copy in NumPy, evaluated."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(BFLOAT16)
    return np.array(array)


def build_model(
    spec: ModelSpec, tensors: Mapping[str, LazyTensor], where: str, *, dtype: str | None = None
) -> Model:
    """The model of ``spec`` with canonical ``tensors``, read one at a time.

    ``dtype``: the type to store and compute in; None keeps each tensor's own. Raises
    LayoutError, naming ``where``, when the tensors do not match the spec.
    """
    check_tensors(spec, {name: tensor.shape for name, tensor in tensors.items()}, where)
    return _loaded(Model(ModelArgs(spec)), _arrays(tensors, dtype))


def build_packed(spec: ModelSpec, packed: Packed, *, dtype: str | None = None) -> Model:
    """The model of ``spec`` with quantised matrices, which MLX multiplies as they are."""
    model = Model(ModelArgs(spec))
    packings = {stacked_name(name): packing for name, packing in packed.modules.items()}

    def packing(path: str, module: nn.Module) -> bool | dict[str, Any]:
        found = packings.get(path)
        return found is not None and {"bits": found.bits, "group_size": found.group_size}

    nn.quantize(model, class_predicate=packing)
    floats = {name for name, tensor in packed.tensors.items() if tensor.dtype.kind != "u"}
    arrays = _arrays({name: packed.tensors[name] for name in floats}, dtype)
    words = [(name, to_mlx(t.read())) for name, t in packed.tensors.items() if name not in floats]
    return _loaded(model, [*arrays, *words])


def _loaded(model: Model, arrays: Iterable[tuple[str, mx.array]]) -> Model:
    weights = []
    for name, array in stacked(arrays, model.spec):
        # At once, so that single experts are let go of.
        mx.eval(array)
        weights.append((name, array))
    model.load_weights(weights, strict=True)
    model.eval()
    mx.eval(model.parameters())
    return model


def _arrays(tensors: Mapping[str, LazyTensor], dtype: str | None) -> Iterator[tuple[str, mx.array]]:
    for name, tensor in tensors.items():
        if name.endswith(FLOAT32_SUFFIXES):
            tensor = tensor.astype(np.dtype(np.float32))
        elif dtype is not None:
            tensor = tensor.astype(dtype_named(dtype))
        yield name, to_mlx(tensor.read())


def load_source(source: Source, *, dtype: str | None = None) -> Model:
    """The model of an opened source. Raises SupraError when its tensors cannot be read.

    What is quantised stays so: ``dtype`` is then that of everything else.
    """
    if source.packed is not None:
        return build_packed(source.spec, source.packed, dtype=dtype)
    return build_model(source.spec, source.tensors, str(source.path), dtype=dtype)
