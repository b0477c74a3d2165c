"""Mistral: Llama's shape without biases, with an optional sliding window in every layer."""

from __future__ import annotations

from typing import Any

from supra_core.families.shared.common import (
    config_from_spec,
    spec_from_fields,
    uniform_mixers,
)
from supra_core.families.shared.fields import Fields
from supra_core.families.shared.layer_kinds import DEFAULT_WINDOW
from supra_core.model.spec import ModelSpec

MODEL_TYPE = "mistral"

# What transformers assumes where a config says nothing; null means as many.
_DEFAULT_KEY_VALUE_HEADS = 8


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    fields = Fields(config, where)
    return spec_from_fields(
        fields,
        MODEL_TYPE,
        attention_bias="none",
        key_value_heads=None if "num_key_value_heads" in config else _DEFAULT_KEY_VALUE_HEADS,
        max_positions=131072,
        mixers=uniform_mixers(fields, DEFAULT_WINDOW),
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    return config_from_spec(spec, MODEL_TYPE, "MistralForCausalLM", biases=("none",), windows="one")
