"""Llama: full attention, optionally with biases on all projections of attention or the MLP."""

from __future__ import annotations

from typing import Any

from supra_core.families.shared.common import (
    config_from_spec,
    refuse_windows,
    spec_from_fields,
    uniform_mixers,
)
from supra_core.families.shared.features import MLP_BIAS
from supra_core.families.shared.fields import Fields
from supra_core.model.spec import ModelSpec

MODEL_TYPE = "llama"


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    """The spec of a Llama config; ``where`` names its file in errors."""
    fields = Fields(config, where)
    return spec_from_fields(
        fields,
        MODEL_TYPE,
        attention_bias="qkvo" if fields.flag("attention_bias", default=False) else "none",
        key_value_heads=None,
        max_positions=2048,
        mixers=uniform_mixers(fields, None),
        mlp_bias=fields.flag("mlp_bias", default=False),
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """The Llama config of ``spec``."""
    config = config_from_spec(spec, MODEL_TYPE, "LlamaForCausalLM", states={MLP_BIAS})
    refuse_windows(spec, MODEL_TYPE, "use mistral")
    return {**config, "attention_bias": spec.attention_bias == "qkvo", "mlp_bias": spec.mlp_bias}
