"""Quantising a model's matrices with MLX, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import mlx.core as mx
import numpy as np

from supra_core.errors import SupraError
from supra_core.formats.mlx_quantized import Packed, Packing
from supra_core.model.layout import FLOAT32_SUFFIXES, stacked_name
from supra_core.model.spec import ModelSpec
from supra_core.tensors import Array, LazyTensor, TensorSource, dtype_named
from supra_mlx.feed_forward import ROUTER
from supra_mlx.mixers import MIXERS
from supra_mlx.model import Model, ModelArgs
from supra_mlx.weights import to_mlx, to_numpy

BITS = (4, 6, 8)
GROUP_SIZE = 64
# Where two bits more save most for their bytes, measured one kind at a time on SmolLM2-135M:
# docs/results/quantisation.md.
_FINER = {"embed_tokens", "lm_head"}.union(*(mixer.finer_matrices for mixer in MIXERS.values()))
_MORE_BITS = 2


def quantised(spec: ModelSpec, tensors: TensorSource, dtype: str, bits: int) -> Packed:
    """The model with packed matrices; nothing is read yet.

    Values, embeddings and feature maps get two bits more, up to eight. What is no matrix, what
    mixes single heads, routers, and rows that no group divides stay in ``dtype``, as do scales.
    Raises SupraError for other ``bits`` than 4, 6, 8 and when there is nothing to quantise.
    """
    check_bits(bits)
    packed: dict[str, LazyTensor] = {}
    modules: dict[str, Packing] = {}
    matrices, quantiser = set(_matrices(spec)), _Quantiser()
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        exact = name.endswith(FLOAT32_SUFFIXES)
        stored = tensor.astype(dtype_named("float32" if exact else dtype))
        if part != "weight" or stacked_name(module) not in matrices or tensor.shape[1] % GROUP_SIZE:
            packed[name] = stored
            continue
        finer = module.rpartition(".")[2] in _FINER
        modules[module] = Packing(min(bits + _MORE_BITS, max(BITS)) if finer else bits, GROUP_SIZE)
        packed |= dict(quantiser.parts(module, stored, modules[module]))
    if not modules:
        raise SupraError(
            f"no matrix of the model has rows of a multiple of {GROUP_SIZE} numbers: leave out "
            "--quantize"
        )
    return Packed(packed, modules)


def check_bits(bits: int) -> None:
    """Raise SupraError for bits that nothing is quantised to here."""
    if bits not in BITS:
        raise SupraError(f"--quantize must be one of {', '.join(map(str, BITS))}, not {bits}")


def _matrices(spec: ModelSpec) -> Iterator[str]:
    """Modules that MLX can quantise, but for routers, which are small and decide much."""
    for name, module in Model(ModelArgs(spec)).named_modules():
        if hasattr(module, "to_quantized") and not name.endswith(ROUTER):
            yield name


class _Quantiser:
    """Packs one matrix at a time; its three parts are asked for one after the other."""

    def __init__(self) -> None:
        self._newest: tuple[str, tuple[Array, ...]] = ("", ())

    def parts(
        self, module: str, weight: LazyTensor, packing: Packing
    ) -> Iterator[tuple[str, LazyTensor]]:
        """``weight``, ``scales`` and ``biases`` of a module, packed when they are read."""
        rows, columns = weight.shape
        groups = columns // packing.group_size

        def part(index: int) -> Array:
            if self._newest[0] != module:
                packed = mx.quantize(to_mlx(weight.read()), packing.group_size, packing.bits)
                self._newest = module, tuple(to_numpy(array) for array in packed)
            return self._newest[1][index]

        for index, (name, shape, kind) in enumerate(
            (
                ("weight", (rows, columns * packing.bits // 32), np.dtype(np.uint32)),
                ("scales", (rows, groups), weight.dtype),
                ("biases", (rows, groups), weight.dtype),
            )
        ):
            yield f"{module}.{name}", LazyTensor(shape, kind, partial(part, index))
