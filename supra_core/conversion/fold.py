"""Exact folding of a feature map's learned part into q_proj and k_proj.

Where no rotation stands between them, the product of the two matrices and the bias are all that
inference needs. The scale of the queries, where the model has one, is folded with them. The
products are taken in float64 and stored in the weights' type.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import numpy.typing as npt

from supra_core.errors import SpecError
from supra_core.mixers import Mixer
from supra_core.mixers.base import Float64
from supra_core.model.layout import layer_prefix, tensor_shapes
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor, TensorSource


def can_fold(spec: ModelSpec) -> bool:
    """Whether some layer's feature map can be folded exactly."""
    return any(mixer.can_fold(spec) for mixer in spec.mixers)


def fold(spec: ModelSpec, tensors: Mapping[str, LazyTensor]) -> tuple[ModelSpec, TensorSource]:
    """The same function with fewer parameters; layers that cannot be folded stay as they are.

    Raises SpecError when no layer can be.
    """
    if spec.query_key_norm != "none":
        raise SpecError(
            "nothing can be folded: between q_proj and the feature map stands the model's norm of "
            "queries and keys, which is not a matrix; omit `fold`"
        )
    if not can_fold(spec):
        raise SpecError(
            "nothing can be folded: a feature map folds where no rotation stands between it and "
            "q_proj (rope between or after), and only once; omit `fold`"
        )
    mixers, new = list(spec.mixers), dict(tensors)
    for index, mixer in enumerate(mixers):
        if mixer.can_fold(spec):
            mixers[index], prefix = mixer.folded_form(spec), layer_prefix(index) + "self_attn."
            new |= _folded(spec, mixer, mixers[index], prefix, tensors)
    folded = spec.with_mixers(mixers)
    return folded, {name: new[name] for name in tensor_shapes(folded)}


def _folded(
    spec: ModelSpec, mixer: Mixer, form: Mixer, prefix: str, tensors: Mapping[str, LazyTensor]
) -> dict[str, LazyTensor]:
    """The q_proj and k_proj of one layer's folded ``form``, in the weights' type."""

    def weight(name: str) -> Float64 | None:
        tensor = tensors.get(prefix + name)
        return None if tensor is None else tensor.read().astype(np.float64)

    def read(name: str, dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
        return mixer.fold(name, spec, weight).astype(dtype)

    folded = {}
    for name, shape in form.tensors(spec).items():
        if name.startswith(("q_proj.", "k_proj.")):
            dtype = tensors[f"{prefix}{name[0]}_proj.weight"].dtype
            folded[prefix + name] = LazyTensor(shape, dtype, partial(read, name, dtype))
    return folded
