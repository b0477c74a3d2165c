"""What a model may have beyond Llama's shape: who writes a config has to be able to state it."""

from __future__ import annotations

from supra_core.model.spec import ModelSpec

QUERY_KEY_NORM = "a norm of queries and keys"
NORM_AFTER = "norms after its sublayers"
NORM_BOTH = "norms before and after its sublayers"
NORM_OFFSET = "norm weights with an offset"
GELU = "a GELU in its feed-forward network"
EMBEDDING_SCALE = "scaled embeddings"
RESIDUAL_SCALE = "a residual multiplier"
ATTENTION_SCALE = "an attention scale of its own"
ATTENTION_SOFTCAP = "capped attention scores"
LOGITS_DIVISOR = "divided logits"
LOGITS_SOFTCAP = "capped logits"
PARTIAL_ROPE = "rope over a part of the channels"
NO_ROPE_LAYERS = "layers without rope"
LOCAL_ROPE = "a second rope"
EXPERTS = "a mixture of experts"
MLP_BIAS = "biases in its feed-forward network"


def later_features(spec: ModelSpec) -> set[str]:
    """Which of them the model has."""
    present = {
        QUERY_KEY_NORM: spec.query_key_norm != "none",
        NORM_AFTER: spec.block_norm == "after",
        NORM_BOTH: spec.block_norm == "both",
        NORM_OFFSET: spec.norm.weight_offset != 0,
        GELU: spec.hidden_act != "silu",
        EMBEDDING_SCALE: spec.embedding_scale != 1,
        RESIDUAL_SCALE: spec.residual_scale != 1,
        ATTENTION_SCALE: spec.attention_scale is not None,
        ATTENTION_SOFTCAP: spec.attention_softcap is not None,
        LOGITS_DIVISOR: spec.logits_divisor != 1,
        LOGITS_SOFTCAP: spec.logits_softcap is not None,
        PARTIAL_ROPE: spec.rope.fraction != 1,
        NO_ROPE_LAYERS: any(m.rotary == "none" for m in spec.mixers),
        LOCAL_ROPE: any(m.rotary == "local" for m in spec.mixers),
        EXPERTS: spec.experts is not None,
        MLP_BIAS: spec.mlp_bias,
    }
    return {feature for feature, there in present.items() if there}
