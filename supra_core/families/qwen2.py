"""Qwen2 and Qwen2.5: biases on q, k and v, and an optional sliding window in the upper layers."""

from __future__ import annotations

from typing import Any

from supra_core.families.shared.common import config_from_spec, spec_from_fields
from supra_core.families.shared.fields import Fields
from supra_core.families.shared.layer_kinds import switched_config, switched_windows
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.spec import ModelSpec

MODEL_TYPE = "qwen2"


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    fields = Fields(config, where)
    return spec_from_fields(
        fields,
        MODEL_TYPE,
        attention_bias="qkv",
        key_value_heads=None if "num_key_value_heads" in config else 32,
        max_positions=32768,
        mixers=[SoftmaxAttention(window) for window in switched_windows(fields)],
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = config_from_spec(
        spec, MODEL_TYPE, "Qwen2ForCausalLM", biases=("qkv",), windows="by_layer"
    )
    return {**config, **switched_config(spec, MODEL_TYPE)}
