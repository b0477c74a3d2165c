"""Mistral: Llama's shape without biases, with an optional sliding window in every layer."""

from __future__ import annotations

from typing import Any

from supra_core.errors import SpecError
from supra_core.families.shared.common import (
    config_from_spec,
    spec_from_fields,
    uniform_mixers,
    uniform_window,
)
from supra_core.families.shared.fields import Fields
from supra_core.model.spec import ModelSpec

MODEL_TYPE = "mistral"

# What transformers assumes where a config says nothing; null means none, or as many.
_DEFAULT_WINDOW = 4096
_DEFAULT_KEY_VALUE_HEADS = 8


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    """The spec of a Mistral config; ``where`` names its file in errors."""
    fields = Fields(config, where)
    window = None
    if "sliding_window" not in config or fields.has("sliding_window"):
        window = fields.integer("sliding_window", default=_DEFAULT_WINDOW)
    return spec_from_fields(
        fields,
        MODEL_TYPE,
        attention_bias="none",
        key_value_heads=None if "num_key_value_heads" in config else _DEFAULT_KEY_VALUE_HEADS,
        max_positions=131072,
        mixers=uniform_mixers(fields, window),
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """The Mistral config of ``spec``."""
    config = config_from_spec(spec, MODEL_TYPE, "MistralForCausalLM")
    if spec.attention_bias != "none":
        raise SpecError("attention biases cannot be written as mistral: use llama")
    return {**config, "sliding_window": uniform_window(spec, MODEL_TYPE)}
