"""Tiny models for the tests: one spec for every choice that a layer has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from supra_core.mixers import Mixer
from supra_core.mixers.linear import LinearAttention
from supra_core.mixers.parts import (
    FeatureMap,
    Folded,
    GroupNorm,
    Identity,
    LearnedDecay,
    LightningDecay,
    NoDecay,
    Norm,
    Projection,
    RetnetDecay,
    SumNormaliser,
)
from supra_core.mixers.positions import (
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    RotaryEmbedding,
    YarnScaling,
)
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.mixers.window import WindowAttention
from supra_core.model.layout import tensor_shapes
from supra_core.model.reference import ReferenceModel
from supra_core.model.spec import Experts, LayerSpec, ModelSpec
from supra_core.tensors import LazyTensor

Weights = dict[str, npt.NDArray[np.float32]]

# Six heads in groups of three, ten channels a head: no power of two.
_SIZE = 10
_BASE = ModelSpec(
    vocab_size=50, hidden_size=24, intermediate_size=40, num_attention_heads=6,
    num_key_value_heads=2, head_dim=_SIZE, value_head_dim=8,
    layers=(LayerSpec(SoftmaxAttention()),),
)  # fmt: skip

PAPER = LinearAttention(
    FeatureMap("relu", _SIZE, Projection("all_heads")), "after", LightningDecay(), GroupNorm(),
    key_scale=_SIZE**-0.5,
)  # fmt: skip
HEDGEHOG = LinearAttention(
    FeatureMap("signed_softmax", 6, Projection("per_head")), "before", LearnedDecay(),
    SumNormaliser(), gain="per_head",
)  # fmt: skip
WINDOWED = replace(HEDGEHOG, window=5)
LONG_WINDOW = replace(WINDOWED, window=70)


def _model(*mixers: Mixer, **fields: Any) -> ModelSpec:
    return replace(_BASE, layers=tuple(LayerSpec(mixer) for mixer in mixers), **fields)


def with_experts(spec: ModelSpec, experts: Experts, dense: tuple[int, ...] = ()) -> ModelSpec:
    """The same model with a mixture of experts in every layer but the ``dense`` ones."""
    layers = tuple(
        layer if index in dense else replace(layer, feed_forward="experts")
        for index, layer in enumerate(spec.layers)
    )
    return replace(spec, layers=layers, experts=experts)


SPECS: dict[str, ModelSpec] = {
    "transformer": _model(SoftmaxAttention(), SoftmaxAttention(), attention_bias="qkvo"),
    "sliding": _model(SoftmaxAttention(7), SoftmaxAttention(20), attention_bias="qkv"),
    "paper": _model(PAPER, PAPER),
    "paper_shared": _model(
        replace(PAPER, feature_map=FeatureMap("relu", _SIZE, Projection("all_heads", shared=True))),
        num_key_value_heads=6,
    ),
    "paper_variant": _model(
        replace(PAPER, decay=RetnetDecay(), qk_norm=True, gain="per_channel"),
        replace(PAPER, decay=LightningDecay(start=0.3)),
        norm=Norm("layer_norm", 1e-6), embedding_norm=True, tie_word_embeddings=True,
        rope=RotaryEmbedding(pairing="interleaved"),
    ),
    "folded": _model(
        replace(PAPER, feature_map=FeatureMap("relu", 12, Folded(bias=True))),
        replace(PAPER, feature_map=FeatureMap("signed_relu", 12, Folded(bias=False))),
    ),
    "between": _model(
        replace(
            HEDGEHOG, rope_position="between",
            feature_map=FeatureMap("relu", 6, Projection("per_head")),
        ),
        rope=RotaryEmbedding(scaling=LinearScaling(4.0)), attention_bias="qkv",
    ),
    "plain": _model(
        LinearAttention(FeatureMap("none", _SIZE, Identity()), "none", NoDecay(), GroupNorm(1e-3)),
        HEDGEHOG,
        rope=RotaryEmbedding(500000.0, "interleaved", Llama3Scaling(8.0, 1.0, 4.0, 32)),
    ),
    "yarn": _model(
        replace(HEDGEHOG, rope_position="before"), WINDOWED, SoftmaxAttention(7),
        replace(WINDOWED, rope_position="between"),
        rope=RotaryEmbedding(1000.0, "half", YarnScaling(4.0, 64, 1.3, 16.0, 2.0, truncate=False)),
    ),
    "longrope": _model(
        WINDOWED, SoftmaxAttention(),
        rope=RotaryEmbedding(
            scaling=LongropeScaling((1.0, 1.5), (3.0, 9.0), 16, 1.2, "long"), fraction=0.4
        ),
    ),
    "windowed": _model(WINDOWED, LONG_WINDOW),
    "windowed_between": _model(
        replace(WINDOWED, rope_position="between"), replace(LONG_WINDOW, rope_position="none")
    ),
    "window": _model(WindowAttention(5, 2), WindowAttention(9, 0), WindowAttention(70, 3)),
    "window_hybrid": _model(
        WindowAttention(4, 1, rotary="none"), WINDOWED, WindowAttention(6, 4), SoftmaxAttention(),
        query_key_norm="per_head", attention_softcap=3.0,
    ),
    "sink": _model(replace(HEDGEHOG, normaliser=SumNormaliser(sink=True)), HEDGEHOG),
    "windowed_sink": _model(
        replace(WINDOWED, normaliser=SumNormaliser(sink=True)),
        replace(LONG_WINDOW, normaliser=SumNormaliser(sink=True)),
    ),
    # What other families than Llama have, together: Gemma's, then OLMo 2's, Phi's and SmolLM3's.
    "sandwich": _model(
        SoftmaxAttention(7, rotary="local"), replace(WINDOWED, rotary="local"),
        SoftmaxAttention(), replace(PAPER, rotary="local"),
        norm=Norm("rms_norm", 1e-5, weight_offset=1.0), block_norm="both",
        hidden_act="gelu_pytorch_tanh", query_key_norm="per_head", attention_scale=0.4,
        attention_softcap=3.0, logits_softcap=5.0, embedding_scale=2.0,
        local_rope=RotaryEmbedding(100.0), tie_word_embeddings=True,
    ),
    "norms_after": _model(
        SoftmaxAttention(rotary="none"), SoftmaxAttention(7),
        replace(HEDGEHOG, rope_position="none"), replace(HEDGEHOG, rope_position="before"),
        block_norm="after", query_key_norm="all_heads", residual_scale=0.5, logits_divisor=2.0,
        rope=RotaryEmbedding(fraction=0.4), attention_bias="qkv",
    ),
    "mlp_bias": _model(SoftmaxAttention(), WINDOWED, mlp_bias=True),
    "hybrid": _model(WINDOWED, SoftmaxAttention(7), PAPER, SoftmaxAttention()),
    "experts": with_experts(
        _model(WINDOWED, SoftmaxAttention(), PAPER, hidden_act="gelu_pytorch_tanh"),
        Experts(5, 2, 16), dense=(1,),
    ),
    "experts_linear": with_experts(_model(WINDOWED, PAPER), Experts(3, 2, 16, normalise=False)),
}  # fmt: skip
# Among them they have every choice of a layer: all that the fast set runs of a costly table.
DISTINCT = (
    "sliding", "paper_variant", "between", "longrope", "windowed_sink", "sandwich", "norms_after",
    "hybrid", "experts",
)  # fmt: skip


def random_weights(spec: ModelSpec, seed: int = 0) -> Weights:
    """Noise whose logits are of order one."""
    rng = np.random.default_rng(seed)
    return {
        name: (rng.normal(size=shape) * 0.3 + (len(shape) == 1) * 0.5).astype(np.float32)
        for name, shape in tensor_shapes(spec).items()
    }


def reference(spec: ModelSpec, seed: int = 0) -> ReferenceModel:
    """The definition, with the weights of :func:`lazy_weights`."""
    return ReferenceModel(spec, random_weights(spec, seed))


def lazy_weights(spec: ModelSpec, seed: int = 0) -> dict[str, LazyTensor]:
    """The same weights, as the backends take them."""
    return {name: LazyTensor.of(array) for name, array in random_weights(spec, seed).items()}
