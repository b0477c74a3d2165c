"""Llama: full attention, optionally with biases on all four attention projections."""

from __future__ import annotations

from typing import Any

from supra_core.errors import SpecError
from supra_core.families.common import (
    config_from_spec,
    spec_from_fields,
    uniform_mixers,
    uniform_window,
)
from supra_core.families.fields import Fields
from supra_core.spec import ModelSpec

MODEL_TYPE = "llama"


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    """The spec of a Llama config; ``where`` names its file in errors."""
    fields = Fields(config, where)
    if fields.flag("mlp_bias", default=False):
        raise fields.error("field mlp_bias is true, but biases in the MLP are not supported")
    return spec_from_fields(
        fields,
        MODEL_TYPE,
        attention_bias="qkvo" if fields.flag("attention_bias", default=False) else "none",
        key_value_heads=None,
        max_positions=2048,
        mixers=uniform_mixers(fields, None),
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """The Llama config of ``spec``."""
    config = config_from_spec(spec, MODEL_TYPE, "LlamaForCausalLM")
    if uniform_window(spec, MODEL_TYPE) is not None:
        raise SpecError("sliding-window attention cannot be written as llama: use mistral")
    return {**config, "attention_bias": spec.attention_bias == "qkvo", "mlp_bias": False}
