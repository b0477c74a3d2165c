"""Gemma 3's text model: norms of queries and keys, and a rope of their own for sliding layers."""

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
    FULL,
    SLIDING,
    common_window,
    layer_types,
    sliding_layers,
    windows,
)
from supra_core.families.shared.rope import rotary, rotary_of
from supra_core.families.shared.tensors import QUERY_KEY_NORM as NORM_NAMES
from supra_core.mixers.positions import RotaryEmbedding
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.spec import ModelSpec

MODEL_TYPE = "gemma3_text"
NEEDS_BOS = True
MODULES = {**SANDWICH, **NORM_NAMES}

_BASE, _LOCAL_BASE = 1000000.0, 10000.0
_MAX_POSITIONS = 131072


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    fields = Fields(config, where)
    if fields.has("attn_logit_softcapping"):
        raise fields.error(
            "field attn_logit_softcapping is stated, which transformers leaves out for Gemma 3: "
            "set it to null"
        )
    pattern = fields.integer("sliding_window_pattern", "_sliding_window_pattern", default=6)
    sliding = sliding_layers(fields, lambda index: (index + 1) % pattern != 0)
    rope, local = _ropes(fields)
    return gemma_spec(
        fields,
        MODEL_TYPE,
        activation="hidden_activation",
        key_value_heads=4,
        max_positions=_MAX_POSITIONS,
        mixers=[
            SoftmaxAttention(window, rotary="local" if slides else "global")
            for window, slides in zip(windows(fields, sliding), sliding, strict=True)
        ],
        rope=rope,
        local_rope=local if any(sliding) else None,
        query_key_norm="per_head",
        block_norm="both",
        attention_scale=attention_scale(fields),
        logits_softcap=cap(fields, "final_logit_softcapping", None),
    )


def _ropes(fields: Fields) -> tuple[RotaryEmbedding, RotaryEmbedding]:
    """Of full and of sliding layers: ``rope_parameters`` for each, or older single fields."""
    base = fields.number("rope_theta", default=_BASE)
    local_base = fields.number("rope_local_base_freq", default=_LOCAL_BASE)
    stated = fields.values.get("rope_parameters")
    if stated is None:
        rope = rotary(fields, _BASE, partial=False, max_positions=_MAX_POSITIONS)
        return rope, RotaryEmbedding(local_base)
    if not isinstance(stated, dict) or not set(stated) <= {FULL, SLIDING}:
        raise fields.error(f"field rope_parameters must have {FULL} and {SLIDING}, not {stated!r}")
    if not all(isinstance(entry, dict | None) for entry in stated.values()):
        raise fields.error(f"field rope_parameters must hold objects, not {stated!r}")
    where = f"{fields.where}: field rope_parameters"
    # As in transformers: what rope_scaling states is said of the full layers, and counts.
    scaling = fields.values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise fields.error(f"field rope_scaling must be an object, not {scaling!r}")
    full = Fields({**(stated.get(FULL) or {}), **scaling}, where)
    sliding = Fields(stated.get(SLIDING) or {}, where)
    return rotary_of(full, base, partial=False), rotary_of(sliding, local_base, partial=False)


def to_config(spec: ModelSpec) -> dict[str, Any]:
    states = {has.ATTENTION_SCALE, has.LOCAL_ROPE, has.LOGITS_SOFTCAP, has.NORM_BOTH}
    states.add(has.QUERY_KEY_NORM)
    config = gemma_config(spec, MODEL_TYPE, "Gemma3ForCausalLM", states=states, windows="by_layer")
    kinds = layer_types(spec)
    return {
        **config,
        "rope_local_base_freq": spec.local_rope.base if spec.local_rope else _LOCAL_BASE,
        "sliding_window": common_window(spec, MODEL_TYPE, mixed=True),
        # For readers that know no layer_types.
        "sliding_window_pattern": kinds.index(FULL) + 1 if FULL in kinds else len(kinds) + 1,
        "layer_types": kinds,
        "query_pre_attn_scalar": query_pre_attn_scalar(spec),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": spec.logits_softcap,
    }
