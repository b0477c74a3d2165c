"""Granite: Llama's shape with multipliers of embeddings, residuals, attention and logits."""

from __future__ import annotations

from typing import Any

from supra_core.families.shared.common import (
    config_from_spec,
    refuse_windows,
    spec_from_fields,
    uniform_mixers,
)
from supra_core.families.shared.features import (
    ATTENTION_SCALE,
    EMBEDDING_SCALE,
    LOGITS_DIVISOR,
    MLP_BIAS,
    RESIDUAL_SCALE,
)
from supra_core.families.shared.fields import Fields
from supra_core.model.spec import ModelSpec

MODEL_TYPE = "granite"


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    """The spec of a Granite config; ``where`` names its file in errors."""
    fields = Fields(config, where)
    return spec_from_fields(
        fields,
        MODEL_TYPE,
        attention_bias="qkvo" if fields.flag("attention_bias", default=False) else "none",
        key_value_heads=None,
        max_positions=2048,
        mixers=uniform_mixers(fields, None),
        mlp_bias=fields.flag("mlp_bias", default=False),
        embedding_scale=fields.number("embedding_multiplier", default=1.0),
        residual_scale=fields.number("residual_multiplier", default=1.0),
        attention_scale=fields.number("attention_multiplier", default=1.0),
        logits_divisor=fields.number("logits_scaling", default=1.0),
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """The Granite config of ``spec``."""
    states = {ATTENTION_SCALE, EMBEDDING_SCALE, LOGITS_DIVISOR, MLP_BIAS, RESIDUAL_SCALE}
    config = config_from_spec(spec, MODEL_TYPE, "GraniteForCausalLM", states=states)
    refuse_windows(spec, MODEL_TYPE)
    scale = spec.attention_scale
    return {
        **config,
        "attention_bias": spec.attention_bias == "qkvo",
        "mlp_bias": spec.mlp_bias,
        "embedding_multiplier": spec.embedding_scale,
        "residual_multiplier": spec.residual_scale,
        "attention_multiplier": spec.head_dim**-0.5 if scale is None else scale,
        "logits_scaling": spec.logits_divisor,
    }
