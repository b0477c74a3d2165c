"""Gemma 2: norms on both sides, softcaps, and a sliding window in every other layer."""

from __future__ import annotations

from typing import Any

from supra_core.families.gemma_fields import (
    SANDWICH,
    attention_scale,
    cap,
    gemma_config,
    gemma_spec,
    query_pre_attn_scalar,
)
from supra_core.families.shared import features as has
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
        attention_softcap=cap(fields, "attn_logit_softcapping", 50.0),
        logits_softcap=cap(fields, "final_logit_softcapping", 30.0),
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    states = {has.ATTENTION_SCALE, has.ATTENTION_SOFTCAP, has.LOGITS_SOFTCAP, has.NORM_BOTH}
    config = gemma_config(spec, MODEL_TYPE, "Gemma2ForCausalLM", states=states, windows="by_layer")
    return {
        **config,
        "sliding_window": common_window(spec, MODEL_TYPE, mixed=True),
        "layer_types": layer_types(spec),
        "query_pre_attn_scalar": query_pre_attn_scalar(spec),
        "attn_logit_softcapping": spec.attention_softcap,
        "final_logit_softcapping": spec.logits_softcap,
    }
