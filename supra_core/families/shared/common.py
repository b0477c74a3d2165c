"""What the Llama-shaped families share: their config's fields to a spec, and back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

from supra_core.errors import SpecError
from supra_core.families.shared.features import MLP_BIAS, later_features
from supra_core.families.shared.fields import Fields, layer_count
from supra_core.families.shared.layer_kinds import check_layer_types, common_window
from supra_core.families.shared.rope import SCALINGS, rotary, scaling_config
from supra_core.mixers import Mixer
from supra_core.mixers.parts import Norm
from supra_core.mixers.positions import RotaryEmbedding
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.spec import LayerSpec, ModelSpec, Provenance


def spec_from_fields(
    fields: Fields,
    family: str,
    *,
    attention_bias: Literal["none", "qkv", "qkvo"] | None = None,
    key_value_heads: int | None,
    max_positions: int,
    mixers: Sequence[Mixer],
    head_dim: int | None = None,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    base: float = 10000.0,
    rope: RotaryEmbedding | None = None,
    partial_rope: bool = False,
    original_positions: int | None = None,
    tied: bool = False,
    activation: Literal["silu", "gelu_pytorch_tanh"] = "silu",
    feed_forwards: Sequence[Literal["dense", "experts"]] | None = None,
    **features: Any,
) -> ModelSpec:
    """The spec of a Llama-shaped config.

    What the family takes where the config states nothing: ``key_value_heads`` (None: as many as
    query heads), ``head_dim`` (None: the hidden size over the heads), ``max_positions``, ``eps``,
    the rope's ``base``, ``tied`` embeddings, and ``original_positions``, the length that a scaled
    rope started from. ``attention_bias``: None where the field of that name states it.
    ``partial_rope``: whether only some channels may rotate. ``feed_forwards``: the kind of each
    layer's network, None where all are dense. ``features``: further fields of the spec.
    """
    _refuse_unsupported(fields, partial_rope, activation)
    check_layer_types(fields, [mixer.window for mixer in mixers])
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if head_dim is None and not fields.has("head_dim") and hidden % heads:
        raise fields.error(
            f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}): "
            "state head_dim or correct them"
        )
    head_dim = fields.integer("head_dim", default=head_dim or hidden // heads)
    kinds = feed_forwards or ["dense"] * len(mixers)
    if attention_bias is None:
        attention_bias = "qkvo" if fields.flag("attention_bias", default=False) else "none"
    try:
        return ModelSpec(
            vocab_size=fields.integer("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=fields.integer(
                "num_key_value_heads", default=key_value_heads or heads
            ),
            head_dim=head_dim,
            value_head_dim=head_dim,
            layers=tuple(LayerSpec(*parts) for parts in zip(mixers, kinds, strict=True)),
            norm=Norm("rms_norm", fields.number("rms_norm_eps", default=eps), weight_offset),
            rope=rope
            or rotary(
                fields,
                base,
                partial_rope,
                max_positions=max_positions,
                original_positions=original_positions,
            ),
            tie_word_embeddings=fields.flag("tie_word_embeddings", default=tied),
            attention_bias=attention_bias,
            max_position_embeddings=fields.integer(
                "max_position_embeddings", default=max_positions
            ),
            bos_token_id=fields.token("bos_token_id"),
            eos_token_id=fields.tokens("eos_token_id"),
            pad_token_id=fields.token("pad_token_id"),
            provenance=Provenance(family=family),
            hidden_act=activation,
            **features,
        )
    except SpecError as error:
        raise fields.located(error) from None


def uniform_mixers(fields: Fields, default: int | None, slides: bool = True) -> list[Mixer]:
    """Every layer the same, with ``sliding_window`` if it ``slides``: null is none, and ``default``
    what the family takes where the config does not state it."""
    window = None
    if slides and fields.stated("sliding_window", by_default=default is not None):
        window = fields.integer("sliding_window", default=default)
    return [SoftmaxAttention(window)] * layer_count(fields, "num_hidden_layers")


def config_from_spec(
    spec: ModelSpec,
    family: str,
    architecture: str,
    *,
    states: Collection[str] = (),
    biases: Collection[str] = ("none", "qkvo"),
    scales: Collection[str] = SCALINGS,
    windows: Literal["none", "one", "by_layer"] = "none",
) -> dict[str, Any]:
    """The config all Llama-shaped families share; :class:`SpecError` if it can't state ``spec``.

    ``states``: the features and ``biases`` the family has; ``scales``: the kinds of scaled rope it
    has; ``windows``: whether ``sliding_window`` is of all layers, or the caller states windows.
    """
    _refuse_inexpressible(spec, family, states, biases)
    scaling = spec.rope.scaling
    if scaling is not None and scaling.kind not in scales:
        raise SpecError(
            f"a rope scaled by {scaling.kind} cannot be written as {family}: write it as supra"
        )
    eos, optional = list(spec.eos_token_id), dict[str, Any]()
    if "qkvo" in biases:
        optional["attention_bias"] = spec.attention_bias == "qkvo"
    if MLP_BIAS in states:
        optional["mlp_bias"] = spec.mlp_bias
    if windows != "by_layer":
        window = common_window(spec, family)
        if windows == "one":
            optional["sliding_window"] = window
        elif window is not None:
            raise SpecError(
                f"sliding-window attention cannot be written as {family}: write it as supra instead"
            )
    return {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": spec.norm.eps,
        "max_position_embeddings": spec.max_position_embeddings,
        "rope_theta": spec.rope.base,
        "rope_scaling": scaling_config(spec.rope, spec.max_position_embeddings),
        "tie_word_embeddings": spec.tie_word_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": spec.pad_token_id,
        **optional,
    }


def _refuse_unsupported(fields: Fields, partial_rope: bool, activation: str) -> None:
    if activation == "silu" and fields.text("hidden_act", default="silu") not in ("silu", "swish"):
        raise fields.error(
            f"field hidden_act is '{fields.values['hidden_act']}', but only silu is supported"
        )
    if fields.has("quantization_config"):
        raise fields.error(
            "field quantization_config states quantised weights: get the unquantised model"
        )
    if not partial_rope and fields.number("partial_rotary_factor", default=1.0) != 1.0:
        raise fields.error("field partial_rotary_factor must be 1: others are not supported")


def _refuse_inexpressible(
    spec: ModelSpec, family: str, states: Collection[str], biases: Collection[str]
) -> None:
    phrases = {
        "none": "no biases on q, k and v",
        "qkv": "biases on q, k and v alone",
        "qkvo": "biases on q, k, v and o",
    }
    problems = {
        "linear-attention layers": not spec.is_transformer,
        "LayerNorm": spec.norm.kind != "rms_norm",
        "interleaved rope": spec.rope.pairing != "half",
        "a norm after the embeddings": spec.embedding_norm,
        "value heads of another size": spec.value_head_dim != spec.head_dim,
        phrases[spec.attention_bias]: spec.attention_bias not in biases,
        **{feature: feature not in states for feature in sorted(later_features(spec))},
    }
    for problem, present in problems.items():
        if present:
            raise SpecError(
                f"a model with {problem} cannot be written as a plain {family} transformer: "
                "write it as supra instead"
            )
