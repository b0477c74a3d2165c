"""SmolLM3: Llama's shape with layers that have no rope, and optionally a window there."""

from __future__ import annotations

from typing import Any

from supra_core.families.shared import features as has
from supra_core.families.shared.common import config_from_spec, spec_from_fields
from supra_core.families.shared.fields import Fields, layer_count
from supra_core.families.shared.layer_kinds import (
    common_window,
    layer_types,
    refuse_unused,
    sliding_layers,
    windows,
)
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.spec import ModelSpec

MODEL_TYPE = "smollm3"


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    fields = Fields(config, where)
    rotated = _rotated_layers(fields)
    used = fields.flag("use_sliding_window", default=False) and fields.has("sliding_window")
    sliding = sliding_layers(fields, lambda index: used and not rotated[index])
    refuse_unused(fields, sliding, used)
    mixers = [
        SoftmaxAttention(window, rotary="global" if rotates else "none")
        for window, rotates in zip(windows(fields, sliding), rotated, strict=True)
    ]
    return spec_from_fields(
        fields,
        MODEL_TYPE,
        key_value_heads=None if "num_key_value_heads" in config else 4,
        max_positions=32768,
        base=2000000.0,
        tied=True,
        mixers=mixers,
        mlp_bias=fields.flag("mlp_bias", default=False),
    )


def _rotated_layers(fields: Fields) -> tuple[bool, ...]:
    """Which layers have a rope: ``no_rope_layers`` says 1 where they have."""
    layers = layer_count(fields, "num_hidden_layers")
    stated = fields.values.get("no_rope_layers")
    if stated is None:
        every = fields.integer("no_rope_layer_interval", default=4)
        return tuple((index + 1) % every != 0 for index in range(layers))
    if (
        not isinstance(stated, list)
        or len(stated) < layers
        or any(entry not in (0, 1) for entry in stated)
    ):
        raise fields.error(
            f"field no_rope_layers must hold 0 or 1 for each of {layers} layers, not {stated!r}"
        )
    return tuple(bool(entry) for entry in stated[:layers])


def to_config(spec: ModelSpec) -> dict[str, Any]:
    states = {has.MLP_BIAS, has.NO_ROPE_LAYERS}
    config = config_from_spec(
        spec, MODEL_TYPE, "SmolLM3ForCausalLM", states=states, windows="by_layer"
    )
    window = common_window(spec, MODEL_TYPE, mixed=True)
    return {
        **config,
        "no_rope_layers": [int(mixer.rotary != "none") for mixer in spec.mixers],
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": layer_types(spec),
    }
