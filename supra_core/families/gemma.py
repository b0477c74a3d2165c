"""Gemma: Llama's shape with norm weights less 1, scaled embeddings and a GELU."""

from __future__ import annotations

from typing import Any

from supra_core.families.gemma_fields import GELU_NAMES, gemma_config, gemma_spec
from supra_core.families.shared.common import uniform_mixers
from supra_core.families.shared.fields import Fields
from supra_core.model.spec import ModelSpec

MODEL_TYPE = "gemma"
NEEDS_BOS = True
# The first released files say gelu and mean its approximation.
_ACTIVATIONS = (*GELU_NAMES, "gelu")


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    fields = Fields(config, where)
    return gemma_spec(
        fields,
        MODEL_TYPE,
        activation="hidden_act",
        names=_ACTIVATIONS,
        key_value_heads=16,
        max_positions=8192,
        mixers=uniform_mixers(fields, None, slides=False),
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    return gemma_config(spec, MODEL_TYPE, "GemmaForCausalLM")
