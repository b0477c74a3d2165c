"""A transformer's spec and weights -> a linear one's spec and initial weights.

Three presets:

- ``paper``: exactly the published model (arXiv 2405.06640): relu(W z + b) over all heads, W and
  b at random, RoPE after it, lightning decay, GroupNorm.
- ``windowed``: starts close to the transformer: each head's own [softmax(W z), softmax(-W z)]
  (Hedgehog, arXiv 2402.04347) with W the identity and b zero, RoPE between W and softmax, so
  that W folds away, a normaliser by the sum with a learned sink, a decay that is learned, and a
  gain for each head that begins as 1. The last 128 tokens keep their softmax weights.
- ``pure``: ``windowed`` without that window: no softmax anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from supra_core.errors import SpecError
from supra_core.model.decay import slopes
from supra_core.model.layout import layer_prefix, mixer_shapes, tensor_shapes
from supra_core.model.spec import (
    Decay,
    FeatureMap,
    GroupNorm,
    Identity,
    LearnedDecay,
    LightningDecay,
    LinearAttention,
    ModelSpec,
    NoDecay,
    Normaliser,
    Projection,
    RetnetDecay,
    SoftmaxAttention,
    SumNormaliser,
)
from supra_core.tensors import LazyTensor, TensorSource

Preset = Literal["paper", "windowed", "pure"]

DEFAULT_WINDOW = 128
_INITIAL_LOG_SINK = -3.0
FeatureMapName = Literal["relu", "signed_relu", "signed_softmax", "none"]
DecayName = Literal["lightning", "retnet", "none", "learned"]
OutputNormName = Literal["group_norm", "sum", "sum_sink"]


@dataclass(frozen=True)
class LinearizeOptions:
    """A preset and what differs from it; None leaves a choice to the preset.

    ``window``: tokens that keep softmax weights. ``rope``: where the rotation stands; ``gain``
    and ``feature_bias``: whether those exist. ``keep_softmax``: layers that stay as they are;
    ``keep_softmax_every`` N: every Nth layer stays too. ``seed``: of the random weights, if there
    are any.
    """

    preset: Preset = "windowed"
    feature_map: FeatureMapName | None = None
    decay: DecayName | None = None
    output_norm: OutputNormName | None = None
    window: int | None = None
    rope: Literal["before", "between", "after"] | None = None
    feature_bias: bool = True
    gain: Literal["none", "per_head", "per_channel"] | None = None
    keep_softmax: tuple[int, ...] = ()
    keep_softmax_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise SpecError(f"`seed` must be at least 0, not {self.seed}")
        if self.window is not None and self.window < 1:
            raise SpecError(
                f"`window` must be at least 1 token, not {self.window}: recipe pure has none"
            )
        for name, value, kind in (
            ("preset", self.preset, Preset),
            ("feature_map", self.feature_map, FeatureMapName),
            ("decay", self.decay, DecayName),
            ("output_norm", self.output_norm, OutputNormName),
        ):
            if value is not None and value not in get_args(kind):
                raise SpecError(
                    f"`{name}` '{value}' is unknown: use one of {', '.join(get_args(kind))}"
                )


def linearize(
    spec: ModelSpec, tensors: Mapping[str, LazyTensor], options: LinearizeOptions
) -> tuple[ModelSpec, TensorSource]:
    """The linear model's spec and weights; kept weights stay lazy.

    Raises SpecError when the source is no transformer or a choice is impossible.
    """
    linear, new = linear_spec(spec, options), dict(tensors)
    for index, layer in enumerate(linear.layers):
        if isinstance(layer.mixer, LinearAttention):
            prefix = layer_prefix(index) + "self_attn."
            for name, array in initial_tensors(spec, layer.mixer, options.seed + index).items():
                new[prefix + name] = LazyTensor.of(array)
    return linear, {name: new[name] for name in tensor_shapes(linear)}


def linear_spec(spec: ModelSpec, options: LinearizeOptions) -> ModelSpec:
    """The linear model's spec; raises as :func:`linearize`."""
    if not spec.is_transformer:
        raise SpecError(
            "the source already has linear attention: convert it with `linearize=False`, or "
            "start from the transformer"
        )
    wrong = [index for index in options.keep_softmax if not 0 <= index < spec.num_hidden_layers]
    if wrong:
        raise SpecError(
            f"`keep_softmax` names layer {wrong[0]}, but the model has layers 0 to "
            f"{spec.num_hidden_layers - 1}"
        )
    mixer = linear_mixer(spec, options)
    every, layers = options.keep_softmax_every, spec.num_hidden_layers
    # The last of every so many layers, so that the first ones of a model are linear.
    kept = {*options.keep_softmax, *(range(every - 1, layers, every) if every else ())}
    if len(kept) == layers:
        raise SpecError(
            f"`keep_softmax` names all {layers} layers, and nothing would be linear: leave at "
            "least one out"
        )
    theirs = [m for m in (layer.mixer for layer in spec.layers) if isinstance(m, SoftmaxAttention)]
    mixers = [m if i in kept else _in_place_of(m, mixer) for i, m in enumerate(theirs)]
    plain = all(theirs[i] == SoftmaxAttention() for i in range(layers) if i not in kept)
    provenance = replace(
        spec.provenance, recipe=options.preset, replaced_mixers=() if plain else tuple(theirs)
    )
    return replace(spec.with_mixers(mixers), provenance=provenance)


def _in_place_of(theirs: SoftmaxAttention, mixer: LinearAttention) -> LinearAttention:
    """``mixer`` with the rotation that the transformer's layer has."""
    if theirs.rope == "none":
        return replace(mixer, rope="none")
    return replace(mixer, rotary=theirs.rope)


def linear_mixer(spec: ModelSpec, options: LinearizeOptions) -> LinearAttention:
    """The mixer a preset and its overrides describe for this model."""
    paper = options.preset == "paper"
    heads = spec.num_attention_heads
    activation = options.feature_map or ("relu" if paper else "signed_softmax")
    norm_name = options.output_norm or ("group_norm" if paper else "sum_sink")
    grouped = isinstance(_NORMALISERS[norm_name], GroupNorm)
    scope: Literal["all_heads", "per_head"] = "all_heads" if paper else "per_head"
    shared = paper and heads == spec.num_key_value_heads
    feature_map = FeatureMap(
        activation,
        spec.head_dim,
        Identity()
        if activation == "none"
        else Projection(scope, shared=shared, bias=options.feature_bias),
    )
    published_scale = activation in ("relu", "signed_relu", "none")
    return LinearAttention(
        feature_map=feature_map,
        # Between: as the transformer rotates, and W still folds into q_proj and k_proj.
        rope=options.rope or ("after" if grouped else "between"),
        decay=_DECAYS[options.decay or ("lightning" if paper else "learned")],
        normaliser=_NORMALISERS[norm_name],
        key_scale=feature_map.output_size**-0.5 if published_scale else 1.0,
        gain=options.gain or ("none" if paper else "per_head"),
        window=_window(options, norm_name),
    )


def initial_tensors(
    spec: ModelSpec, mixer: LinearAttention, seed: int
) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
    """What a linear mixer has and the transformer's has not, by name under ``self_attn.``."""
    softmax = mixer_shapes(spec, SoftmaxAttention())
    generator = np.random.default_rng(seed)
    tensors = {}
    for name, shape in mixer_shapes(spec, mixer).items():
        if name not in softmax:
            array = _initial(name, shape, spec, mixer, generator)
            tensors[name] = array.astype(np.float32)
    return tensors


def _initial(
    name: str,
    shape: tuple[int, ...],
    spec: ModelSpec,
    mixer: LinearAttention,
    generator: np.random.Generator,
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    projection = mixer.feature_map.projection
    if name == "log_slope":
        return np.log(slopes(LightningDecay(), spec.num_attention_heads))
    if name == "log_far_gain":
        return np.zeros(shape)
    if name == "log_sink":
        return np.full(shape, _INITIAL_LOG_SINK)
    if name == "gain":
        return np.ones(shape)
    if name in ("q_norm.weight", "k_norm.weight"):
        return np.full(shape, 1.0 - spec.norm.weight_offset)
    assert isinstance(projection, Projection)
    if projection.scope == "per_head":
        if name.endswith("bias"):
            return np.zeros(shape)
        return np.broadcast_to(np.eye(shape[1], shape[2]), shape).copy()
    # torch's default for a linear layer: U(-1/sqrt(fan_in), 1/sqrt(fan_in)), bias included.
    heads = spec.num_attention_heads if name.startswith("q_") else spec.num_key_value_heads
    bound = 1.0 / math.sqrt(heads * spec.head_dim)
    return generator.uniform(-bound, bound, size=shape)


def _window(options: LinearizeOptions, norm_name: OutputNormName) -> int | None:
    """The stated window, or that of ``windowed``, which only the sum normaliser can have."""
    if options.window is None:
        windowed = options.preset == "windowed" and norm_name != "group_norm"
        return DEFAULT_WINDOW if windowed else None
    return options.window


_DECAYS: dict[DecayName, Decay] = {
    "lightning": LightningDecay(),
    "retnet": RetnetDecay(),
    "none": NoDecay(),
    "learned": LearnedDecay(),
}
_NORMALISERS: dict[OutputNormName, Normaliser] = {
    "group_norm": GroupNorm(),
    "sum": SumNormaliser(),
    "sum_sink": SumNormaliser(sink=True),
}
