"""Granite: Llama's shape with multipliers of embeddings, residuals, attention and logits."""

from __future__ import annotations

from typing import Any

from supra_core.families.shared import features as has
from supra_core.families.shared.common import (
    config_from_spec,
    spec_from_fields,
    uniform_mixers,
)
from supra_core.families.shared.fields import Fields
from supra_core.model.spec import ModelSpec

MODEL_TYPE = "granite"


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    fields = Fields(config, where)
    return spec_from_fields(
        fields,
        MODEL_TYPE,
        key_value_heads=None,
        max_positions=2048,
        mixers=uniform_mixers(fields, None, slides=False),
        mlp_bias=fields.flag("mlp_bias", default=False),
        embedding_scale=fields.number("embedding_multiplier", default=1.0),
        residual_scale=fields.number("residual_multiplier", default=1.0),
        attention_scale=fields.number("attention_multiplier", default=1.0),
        logits_divisor=fields.number("logits_scaling", default=1.0),
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    states = {has.ATTENTION_SCALE, has.EMBEDDING_SCALE, has.LOGITS_DIVISOR, has.RESIDUAL_SCALE}
    states.add(has.MLP_BIAS)
    config = config_from_spec(spec, MODEL_TYPE, "GraniteForCausalLM", states=states)
    scale = spec.attention_scale
    return {
        **config,
        "embedding_multiplier": spec.embedding_scale,
        "residual_multiplier": spec.residual_scale,
        "attention_multiplier": spec.head_dim**-0.5 if scale is None else scale,
        "logits_scaling": spec.logits_divisor,
    }
