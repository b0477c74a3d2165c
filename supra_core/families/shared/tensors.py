"""A family's tensor names to the canonical ones, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from supra_core.tensors import Array, LazyTensor, TensorSource

# The norm of queries and keys behind their projections, as Hugging Face calls it; the canonical
# names leave q_norm to linear attention's norm of its features.
QUERY_KEY_NORM = {
    "self_attn.q_norm": "self_attn.q_proj_norm",
    "self_attn.k_norm": "self_attn.k_proj_norm",
}


def renamed(tensors: TensorSource, modules: Mapping[str, str]) -> dict[str, LazyTensor]:
    """The tensors of the layers' ``modules`` under other names; all others as they are."""
    return {_renamed(name, modules): tensor for name, tensor in tensors.items()}


def inverse(modules: Mapping[str, str]) -> dict[str, str]:
    """The way back."""
    return {theirs: ours for ours, theirs in modules.items()}


def split_name(name: str) -> tuple[str, str, str]:
    """``model.layers.3.``, the module in the layer, and ``weight``; "" twice outside of layers."""
    parts = name.split(".")
    if len(parts) < 5 or parts[:2] != ["model", "layers"]:
        return "", "", name
    return ".".join(parts[:3]) + ".", ".".join(parts[3:-1]), parts[-1]


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    layer, module, kind = split_name(name)
    return f"{layer}{modules[module]}.{kind}" if module in modules else name


def parts(tensor: LazyTensor, rows: tuple[int, ...]) -> list[LazyTensor]:
    """A matrix's rows as several matrices, each read by itself."""
    pieces, start = [], 0
    for count in rows:
        pieces.append(_piece(tensor, start, start + count))
        start += count
    return pieces


def fused(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """The inverse of :func:`parts`; all are of one type."""
    rows = sum(tensor.shape[0] for tensor in tensors)

    def read() -> Array:
        return np.concatenate([tensor.read() for tensor in tensors])

    return LazyTensor((rows, *tensors[0].shape[1:]), tensors[0].dtype, read)


def _piece(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    def read_rows(first: int, last: int) -> Array:
        return tensor.rows(start + first, start + last)

    shape = (stop - start, *tensor.shape[1:])
    return LazyTensor(shape, tensor.dtype, lambda: tensor.rows(start, stop), read_rows)
