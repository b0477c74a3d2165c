"""Qwen3: each head's queries and keys are normalised before their rotation."""

from __future__ import annotations

from typing import Any

from supra_core.families.shared import features as has
from supra_core.families.shared.common import config_from_spec, spec_from_fields
from supra_core.families.shared.fields import Fields
from supra_core.families.shared.layer_kinds import switched_config, switched_windows
from supra_core.families.shared.tensors import QUERY_KEY_NORM as NORM_NAMES
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.spec import ModelSpec

MODEL_TYPE = "qwen3"
MODULES = NORM_NAMES


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    fields = Fields(config, where)
    return spec_from_fields(
        fields,
        MODEL_TYPE,
        key_value_heads=None if "num_key_value_heads" in config else 32,
        head_dim=128,
        max_positions=32768,
        mixers=[SoftmaxAttention(window) for window in switched_windows(fields)],
        query_key_norm="per_head",
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = config_from_spec(
        spec, MODEL_TYPE, "Qwen3ForCausalLM", states={has.QUERY_KEY_NORM}, windows="by_layer"
    )
    return {
        **config,
        **switched_config(spec, MODEL_TYPE),
    }
