"""OLMo 2: norms after the sublayers, and of all queries and all keys together."""

from __future__ import annotations

from typing import Any

from supra_core.families.shared import features as has
from supra_core.families.shared.common import (
    config_from_spec,
    spec_from_fields,
    uniform_mixers,
)
from supra_core.families.shared.fields import Fields
from supra_core.families.shared.tensors import QUERY_KEY_NORM as NORM_NAMES
from supra_core.model.spec import ModelSpec

MODEL_TYPE = "olmo2"
MODULES = {
    **NORM_NAMES,
    "post_attention_layernorm": "mixer_output_norm",
    "post_feedforward_layernorm": "mlp_output_norm",
}


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    fields = Fields(config, where)
    return spec_from_fields(
        fields,
        MODEL_TYPE,
        key_value_heads=None,
        max_positions=2048,
        eps=1e-5,
        mixers=uniform_mixers(fields, None, slides=False),
        query_key_norm="all_heads",
        block_norm="after",
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    states = {has.NORM_AFTER, has.QUERY_KEY_NORM}
    return config_from_spec(spec, MODEL_TYPE, "Olmo2ForCausalLM", states=states)
