"""What the Gemma families share: norm weights less 1, scaled embeddings, GELU, tied embeddings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from supra_core.families.shared import features as has
from supra_core.families.shared.common import config_from_spec, spec_from_fields
from supra_core.families.shared.fields import Fields
from supra_core.mixers import Mixer
from supra_core.model.spec import ModelSpec

# transformers' name, and what released files call the same.
GELU_NAMES = ("gelu_pytorch_tanh",)
# Norms on both sides, under the names of Gemma 2 and 3.
SANDWICH = {
    "post_attention_layernorm": "mixer_output_norm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "mlp_output_norm",
}


def gemma_spec(
    fields: Fields,
    family: str,
    *,
    activation: str,
    names: Collection[str] = GELU_NAMES,
    key_value_heads: int,
    max_positions: int,
    base: float = 10000.0,
    mixers: Sequence[Mixer],
    **features: Any,
) -> ModelSpec:
    """The spec of a Gemma config, whose field ``activation`` has to be one of ``names``."""
    if fields.text(activation, default=GELU_NAMES[0]) not in names:
        raise fields.error(
            f"field {activation} is '{fields.values[activation]}', but only {GELU_NAMES[0]} is "
            "supported"
        )
    if fields.values.get("use_bidirectional_attention"):
        raise fields.error(
            "field use_bidirectional_attention is true: such a model reads the text in both "
            "directions, which no recurrent one can"
        )
    return spec_from_fields(
        fields,
        family,
        key_value_heads=key_value_heads,
        head_dim=256,
        max_positions=max_positions,
        base=base,
        weight_offset=1.0,
        tied=True,
        activation="gelu_pytorch_tanh",
        mixers=mixers,
        embedding_scale=fields.integer("hidden_size") ** 0.5,
        **features,
    )


def gemma_config(spec: ModelSpec, family: str, architecture: str, **how: Any) -> dict[str, Any]:
    """The config all Gemma families share; ``how`` as :func:`config_from_spec` has it."""
    states = {has.EMBEDDING_SCALE, has.GELU, has.NORM_OFFSET, *how.pop("states", ())}
    config = config_from_spec(spec, family, architecture, states=states, **how)
    activation = "gelu_pytorch_tanh"
    return {**config, "hidden_act": activation, "hidden_activation": activation}


def attention_scale(fields: Fields) -> float:
    """``query_pre_attn_scalar`` to the power of -1/2."""
    return float(fields.number("query_pre_attn_scalar", default=256) ** -0.5)


def query_pre_attn_scalar(spec: ModelSpec) -> float:
    """The number that :func:`attention_scale` reads."""
    if spec.attention_scale is None:
        return spec.head_dim
    exact = spec.attention_scale**-2
    return round(exact) if round(exact) ** -0.5 == spec.attention_scale else exact


def cap(fields: Fields, name: str, default: float | None) -> float | None:
    """A cap; null is none."""
    stated = fields.stated(name, by_default=default is not None)
    return fields.number(name, default=default) if stated else None
