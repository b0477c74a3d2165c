"""Gemma 2: norms on both sides, softcaps, and a sliding window in every other layer."""

from __future__ import annotations

from typing import Any

from supra_core.families.gemma_fields import (
    SANDWICH,
    attention_scale,
    gemma_config,
    gemma_spec,
    query_pre_attn_scalar,
)
from supra_core.families.shared.features import (
    ATTENTION_SCALE,
    ATTENTION_SOFTCAP,
    LOGITS_SOFTCAP,
    NORM_BOTH,
)
from supra_core.families.shared.fields import Fields
from supra_core.families.shared.layer_kinds import (
    common_window,
    layer_types,
    sliding_layers,
    windows,
)
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.spec import ModelSpec

MODEL_TYPE = "gemma2"
NEEDS_BOS = True
MODULES = SANDWICH


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    """The spec of a Gemma 2 config; ``where`` names its file in errors."""
    fields = Fields(config, where)
    sliding = sliding_layers(fields, lambda index: index % 2 == 0)
    return gemma_spec(
        fields,
        MODEL_TYPE,
        activation="hidden_activation",
        key_value_heads=4,
        max_positions=8192,
        mixers=[SoftmaxAttention(window) for window in windows(fields, sliding)],
        block_norm="both",
        attention_scale=attention_scale(fields),
        attention_softcap=_cap(fields, "attn_logit_softcapping", 50.0),
        logits_softcap=_cap(fields, "final_logit_softcapping", 30.0),
    )


def _cap(fields: Fields, name: str, default: float) -> float | None:
    """A cap; null is none."""
    if name in fields.values and not fields.has(name):
        return None
    return fields.number(name, default=default)


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """The Gemma 2 config of ``spec``."""
    states = {ATTENTION_SCALE, ATTENTION_SOFTCAP, LOGITS_SOFTCAP, NORM_BOTH}
    config = gemma_config(spec, MODEL_TYPE, "Gemma2ForCausalLM", states)
    return {
        **config,
        "sliding_window": common_window(spec, MODEL_TYPE),
        "layer_types": layer_types(spec),
        "query_pre_attn_scalar": query_pre_attn_scalar(spec),
        "attn_logit_softcapping": spec.attention_softcap,
        "final_logit_softcapping": spec.logits_softcap,
    }
