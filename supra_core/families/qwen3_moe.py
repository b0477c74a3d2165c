"""Qwen3 with mixtures of experts: its attention, and in most layers or all a mixture."""

from __future__ import annotations

from typing import Any

from supra_core.families.shared.common import (
    config_from_spec,
    spec_from_fields,
    uniform_mixers,
    uniform_window,
)
from supra_core.families.shared.experts import experts_of, stated_experts
from supra_core.families.shared.features import EXPERTS, QUERY_KEY_NORM
from supra_core.families.shared.fields import Fields
from supra_core.families.shared.tensors import QUERY_KEY_NORM as NORM_NAMES
from supra_core.model.spec import ModelSpec

MODEL_TYPE = "qwen3_moe"
MODULES = NORM_NAMES

# What transformers assumes where a config says nothing.
_DEFAULT_WINDOW = 4096


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    """The spec of a Qwen3-MoE config; ``where`` names its file in errors."""
    fields = Fields(config, where)
    mixers = uniform_mixers(fields, _window(fields))
    dense = _dense_layers(fields, len(mixers))
    step = fields.integer("decoder_sparse_step", default=1)
    sparse = [index not in dense and (index + 1) % step == 0 for index in range(len(mixers))]
    if not any(sparse):
        raise fields.error(
            "by mlp_only_layers and decoder_sparse_step no layer has experts: a model without any "
            "is model_type qwen3"
        )
    experts = experts_of(
        fields,
        count=128,
        per_token=8,
        intermediate_size=fields.integer("moe_intermediate_size", default=768),
        normalise=fields.flag("norm_topk_prob", default=False),
    )
    return spec_from_fields(
        fields,
        MODEL_TYPE,
        attention_bias="qkvo" if fields.flag("attention_bias", default=False) else "none",
        key_value_heads=4,
        max_positions=32768,
        mixers=mixers,
        query_key_norm="per_head",
        feed_forwards=["experts" if has else "dense" for has in sparse],
        experts=experts,
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    """The Qwen3-MoE config of ``spec``."""
    experts = stated_experts(spec, MODEL_TYPE)
    config = config_from_spec(
        spec, MODEL_TYPE, "Qwen3MoeForCausalLM", states={QUERY_KEY_NORM, EXPERTS}
    )
    window = uniform_window(spec, MODEL_TYPE)
    kinds = [layer.feed_forward for layer in spec.layers]
    return {
        **config,
        "attention_bias": spec.attention_bias == "qkvo",
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, kind in enumerate(kinds) if kind == "dense"],
    }


def _window(fields: Fields) -> int | None:
    """That of all layers: ``sliding_window`` counts if ``use_sliding_window`` is true."""
    used = fields.flag("use_sliding_window", default=False)
    # null is none.
    if not used or ("sliding_window" in fields.values and not fields.has("sliding_window")):
        return None
    return fields.integer("sliding_window", default=_DEFAULT_WINDOW)


def _dense_layers(fields: Fields, layers: int) -> set[int]:
    """``mlp_only_layers``: those that have one network whatever the step."""
    stated = fields.values.get("mlp_only_layers")
    stated = [] if stated is None else stated
    # An exact type: true is equal to 1.
    if not isinstance(stated, list) or any(
        type(index) is not int or not 0 <= index < layers for index in stated
    ):
        raise fields.error(
            f"field mlp_only_layers must be a list of layers from 0 to {layers - 1}, not {stated!r}"
        )
    return set(stated)
