"""Exact folding of a feature map's learned part into q_proj and k_proj.

phi(W_q x) = activation(W (W_q x) + b) = activation((W W_q) x + b): with no rotation between
them, the product of the two matrices and the bias are all that inference needs. The scale
of the queries, where the model has one, is folded with them. The products are taken in float64 and
stored in the weights' type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from supra_core.errors import SpecError
from supra_core.model.layout import layer_prefix, tensor_shapes
from supra_core.model.spec import Folded, LayerSpec, LinearAttention, ModelSpec, Projection
from supra_core.tensors import LazyTensor, TensorSource

Float64 = npt.NDArray[np.float64]


def can_fold(spec: ModelSpec) -> bool:
    """Whether some layer's feature map can be folded exactly."""
    return any(_foldable(spec, layer) for layer in spec.layers)


def fold(spec: ModelSpec, tensors: Mapping[str, LazyTensor]) -> tuple[ModelSpec, TensorSource]:
    """The same function with fewer parameters; layers that cannot be folded stay as they are.

    Raises SpecError when no layer can be.
    """
    if spec.query_key_norm != "none":
        raise SpecError(
            "nothing can be folded: between q_proj and the feature map stands the model's norm of "
            "queries and keys, which is no matrix; omit `fold`"
        )
    if not can_fold(spec):
        raise SpecError(
            "nothing can be folded: a feature map folds where no rotation stands between it and "
            "q_proj (rope between or after), and only once; omit `fold`"
        )
    new = dict(tensors)
    layers: list[LayerSpec] = []
    for index, layer in enumerate(spec.layers):
        if _foldable(spec, layer):
            assert isinstance(layer.mixer, LinearAttention)
            _fold_layer(spec, layer.mixer, layer_prefix(index) + "self_attn.", new)
            layer = replace(layer, mixer=_folded_mixer(spec, layer.mixer))
        layers.append(layer)
    folded = replace(spec, layers=tuple(layers))
    return folded, {name: new[name] for name in tensor_shapes(folded)}


def _foldable(spec: ModelSpec, layer: LayerSpec) -> bool:
    mixer = layer.mixer
    return (
        spec.query_key_norm == "none"
        and isinstance(mixer, LinearAttention)
        and isinstance(mixer.feature_map.projection, Projection)
        and mixer.rope != "before"
    )


def _folded_mixer(spec: ModelSpec, mixer: LinearAttention) -> LinearAttention:
    assert isinstance(mixer.feature_map.projection, Projection)
    bias = mixer.feature_map.projection.bias or spec.attention_bias != "none"
    return replace(mixer, feature_map=replace(mixer.feature_map, projection=Folded(bias)))


def _fold_layer(
    spec: ModelSpec, mixer: LinearAttention, prefix: str, tensors: dict[str, LazyTensor]
) -> None:
    """Replace one layer's q_proj and k_proj, and drop its feature map, in ``tensors``."""
    projection, size = mixer.feature_map.projection, mixer.feature_map.size
    assert isinstance(projection, Projection)
    for name, heads in (("q", spec.num_attention_heads), ("k", spec.num_key_value_heads)):
        source = prefix + ("q" if projection.shared else name) + "_feature"
        feature, feature_bias = tensors[source + ".weight"], tensors.get(source + ".bias")
        target = f"{prefix}{name}_proj"
        weight, bias = tensors[target + ".weight"], tensors.get(target + ".bias")
        scale = spec.query_scale if name == "q" else 1.0

        def folded(
            feature: LazyTensor = feature,
            weight: LazyTensor = weight,
            heads: int = heads,
            scale: float = scale,
        ) -> npt.NDArray[np.generic]:
            product = _apply(feature, scale * _float64(weight), heads, size)
            return product.astype(weight.dtype)

        def folded_bias(
            feature: LazyTensor = feature,
            weight: LazyTensor = weight,
            feature_bias: LazyTensor | None = feature_bias,
            bias: LazyTensor | None = bias,
            heads: int = heads,
            scale: float = scale,
        ) -> npt.NDArray[np.generic]:
            total = np.zeros(heads * size)
            if feature_bias is not None:
                total = total + _float64(feature_bias).reshape(-1)
            if bias is not None:
                total = total + _apply(feature, scale * _float64(bias)[:, None], heads, size)[:, 0]
            return total.astype(weight.dtype)

        D = spec.hidden_size
        tensors[target + ".weight"] = LazyTensor((heads * size, D), weight.dtype, folded)
        if feature_bias is not None or bias is not None:
            tensors[target + ".bias"] = LazyTensor((heads * size,), weight.dtype, folded_bias)


def _apply(feature: LazyTensor, x: Float64, heads: int, size: int) -> Float64:
    """The feature map's W times x (heads * d, columns) -> (heads * size, columns)."""
    W = _float64(feature)
    if W.ndim == 2:
        product: Float64 = W @ x
        return product
    per_head = np.matmul(W, x.reshape(heads, W.shape[2], -1))
    return np.asarray(per_head.reshape(heads * size, -1))


def _float64(tensor: LazyTensor) -> Float64:
    return tensor.read().astype(np.float64)
