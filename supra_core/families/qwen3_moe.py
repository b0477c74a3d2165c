"""Qwen3 with mixtures of experts: its attention, and in most layers or all a mixture."""

from __future__ import annotations

from typing import Any

from supra_core.families.shared import features as has
from supra_core.families.shared.common import (
    config_from_spec,
    spec_from_fields,
    uniform_mixers,
)
from supra_core.families.shared.experts import experts_of, stated_experts
from supra_core.families.shared.fields import Fields
from supra_core.families.shared.layer_kinds import DEFAULT_WINDOW
from supra_core.families.shared.tensors import QUERY_KEY_NORM as NORM_NAMES
from supra_core.model.spec import ModelSpec

MODEL_TYPE = "qwen3_moe"
MODULES = NORM_NAMES


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    fields = Fields(config, where)
    slides = fields.flag("use_sliding_window", default=False)
    mixers = uniform_mixers(fields, DEFAULT_WINDOW, slides)
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
        key_value_heads=4,
        max_positions=32768,
        mixers=mixers,
        query_key_norm="per_head",
        feed_forwards=["experts" if has else "dense" for has in sparse],
        experts=experts,
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    experts = stated_experts(spec, MODEL_TYPE)
    states = {has.QUERY_KEY_NORM, has.EXPERTS}
    config = config_from_spec(spec, MODEL_TYPE, "Qwen3MoeForCausalLM", states=states, windows="one")
    kinds = [layer.feed_forward for layer in spec.layers]
    return {
        **config,
        "use_sliding_window": config["sliding_window"] is not None,
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [index for index, kind in enumerate(kinds) if kind == "dense"],
    }


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
