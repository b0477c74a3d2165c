"""MLX's affine quantisation, as mlx-lm writes it into folders.

A module's matrix (out, in) is stored as ``weight`` uint32, the numbers of each row as one stream
of bits, lowest first, and ``scales`` and ``biases`` (out, in / group): w = scale n + bias in each
group of channels. ``quantization`` in config.json holds bits and group size, for all modules or
for one by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from supra_core.errors import FormatError
from supra_core.model.layout import stacked_name
from supra_core.tensors import Array, LazyTensor

_BITS = (2, 3, 4, 5, 6, 8)
_WORD = 32
_PARTS = ("weight", "scales", "biases")


@dataclass(frozen=True)
class Packing:
    """How a matrix is packed."""

    bits: int
    group_size: int


@dataclass(frozen=True)
class Packed:
    """A folder's tensors as they are stored, and the packing of modules by name."""

    tensors: dict[str, LazyTensor]
    modules: dict[str, Packing]

    def config(self) -> dict[str, Any]:
        """``quantization`` of config.json, every module by its name."""
        return packing_config(self.modules)


def packing_config(modules: Mapping[str, Packing]) -> dict[str, Any]:
    """``quantization`` of config.json: the most frequent packing, and the modules with another."""
    packings = list(modules.values())
    common = max(set(packings), key=packings.count)
    return _entry(common) | {name: _entry(one) for name, one in modules.items() if one != common}


def read_packed(tensors: Mapping[str, LazyTensor], config: Any, where: str) -> Packed:
    """The packing of every module that has scales; FormatError when the config does not fit."""
    if not isinstance(config, dict):
        raise FormatError(f"{where}: field quantization must be an object: convert the model again")
    modules = {}
    for name in tensors:
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            modules[module] = _packing(config, module, where)
            _check(tensors, module, modules[module], where)
    return Packed(dict(tensors), modules)


def unpacked(packed: Packed) -> dict[str, LazyTensor]:
    """The same tensors with full matrices, in the type of their scales."""
    full = {}
    for name, tensor in packed.tensors.items():
        module, _, part = name.rpartition(".")
        if module not in packed.modules or part not in _PARTS:
            full[name] = tensor
        elif part == "weight":
            full[name] = _unpacked(packed, module)
    return full


def _unpacked(packed: Packed, module: str) -> LazyTensor:
    weight, scales, biases = (packed.tensors[f"{module}.{part}"] for part in _PARTS)
    packing = packed.modules[module]
    rows, groups = scales.shape

    def read() -> Array:
        numbers = unpack(np.asarray(weight.read()), packing.bits)
        grouped = numbers.reshape(rows, groups, packing.group_size).astype(np.float32)
        scale, bias = (np.asarray(x.read()).astype(np.float32)[..., None] for x in (scales, biases))
        return (grouped * scale + bias).reshape(rows, -1).astype(scales.dtype)

    return LazyTensor((rows, groups * packing.group_size), scales.dtype, read)


def unpack(words: Array, bits: int) -> Array:
    """uint32 (rows, words) -> the numbers (rows, 32 words / bits), uint8."""
    rows = len(words)
    stream = np.unpackbits(
        np.ascontiguousarray(words).view(np.uint8).reshape(rows, -1), axis=1, bitorder="little"
    )
    padded = np.zeros((rows, stream.shape[1] // bits, 8), dtype=np.uint8)
    padded[..., :bits] = stream.reshape(rows, -1, bits)
    return np.packbits(padded, axis=2, bitorder="little")[..., 0]


def _packing(config: Mapping[str, Any], module: str, where: str) -> Packing:
    stated = config.get(module, config.get(stacked_name(module), config))
    fields = stated if isinstance(stated, dict) else {}
    bits, group = fields.get("bits"), fields.get("group_size")
    # Exact types: true and 4.0 are equal to integers.
    if type(bits) is not int or bits not in _BITS or type(group) is not int or group < 1:
        raise FormatError(
            f"{where}: field quantization gives {module} {bits} bits in groups of {group}: known "
            f"are {', '.join(map(str, _BITS))} bits"
        )
    if fields.get("mode", "affine") != "affine":
        raise FormatError(
            f"{where}: field quantization.mode is {fields['mode']}: only affine can be read"
        )
    return Packing(bits, group)


def _check(tensors: Mapping[str, LazyTensor], module: str, packing: Packing, where: str) -> None:
    parts = {part: tensors.get(f"{module}.{part}") for part in _PARTS}
    shapes = {part: None if t is None else t.shape for part, t in parts.items()}
    scales = shapes["scales"]
    fits = (
        parts["weight"] is not None
        and parts["weight"].dtype == np.uint32
        and scales is not None
        and len(scales) == 2
        and shapes["biases"] == scales
        and scales[1] * packing.group_size * packing.bits % _WORD == 0
        and shapes["weight"] == (scales[0], scales[1] * packing.group_size * packing.bits // _WORD)
    )
    if not fits:
        raise FormatError(
            f"{where}: {module} has weight {shapes['weight']}, scales {scales} and biases "
            f"{shapes['biases']}, which {packing.bits} bits in groups of {packing.group_size} do "
            "not give: convert the model again"
        )


def _entry(packing: Packing) -> dict[str, Any]:
    return {"group_size": packing.group_size, "bits": packing.bits, "mode": "affine"}
