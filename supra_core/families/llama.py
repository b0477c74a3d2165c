"""Llama: full attention, optionally with biases on all projections of attention or the MLP."""

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

MODEL_TYPE = "llama"


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    fields = Fields(config, where)
    return spec_from_fields(
        fields,
        MODEL_TYPE,
        key_value_heads=None,
        max_positions=2048,
        mixers=uniform_mixers(fields, None, slides=False),
        mlp_bias=fields.flag("mlp_bias", default=False),
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    return config_from_spec(spec, MODEL_TYPE, "LlamaForCausalLM", states={has.MLP_BIAS})
