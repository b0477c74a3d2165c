"""An artifact's config.json and the spec it states."""

from __future__ import annotations

import json
import re
from typing import Any

from supra_core.errors import SpecError
from supra_core.families.shared.fields import Fields
from supra_core.mixers import KINDS
from supra_core.model.spec import MOST_LAYERS, ModelSpec, format_version

MODEL_TYPE = "supra"
ARCHITECTURE = "SupraForCausalLM"
# The newest version; a spec is written as the oldest version that can state it.
FORMAT_VERSION = max(4, *(kind.format_version for kind in KINDS))

# Characters of JSON a mixer may take: the spec repeats it for each of its layers.
_MIXER_LENGTH = 4000

# Where an error about the spec stands: the file has a table of mixers in the layers' place.
_LAYER = re.compile(r"(?<=^field )layers\.(\d+)\.mixer")
# The spec's fields as config.json states them; ``layers`` is stored as a table instead.
SPEC_FIELDS = tuple(name for name in ModelSpec.__dataclass_fields__ if name != "layers")


def spec_to_config(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """``config.json`` of a model whose weights are stored as ``dtype``.

    ``mixers`` lists each distinct mixer once; ``layer_mixers`` holds each layer's index into it.
    ``layer_feed_forwards`` is there if a layer has experts.
    """
    fields = spec.to_dict()
    mixers: list[dict[str, Any]] = []
    layer_mixers: list[int] = []
    for layer in fields.pop("layers"):
        if layer["mixer"] not in mixers:
            mixers.append(layer["mixer"])
        layer_mixers.append(mixers.index(layer["mixer"]))
    eos = fields["eos_token_id"]
    kinds = [layer.feed_forward for layer in spec.layers]
    feed_forwards = {"layer_feed_forwards": kinds} if spec.experts is not None else {}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "format_version": format_version(spec),
        "torch_dtype": dtype,
        **fields,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "hidden_act": spec.hidden_act,
        "num_hidden_layers": spec.num_hidden_layers,
        "layer_types": [layer.mixer.layer_type for layer in spec.layers],
        "mixers": mixers,
        "layer_mixers": layer_mixers,
        **feed_forwards,
    }


def config_to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    """The spec that ``config.json`` states; ``where`` names it in errors.

    Raises :class:`SpecError` for fields that are missing, wrong, too new or contradictory. Fields
    that other programs add are ignored.
    """
    fields = Fields(config, where)
    if config.get("model_type") != MODEL_TYPE:
        raise fields.error(f"field model_type must be '{MODEL_TYPE}' for a supra model")
    version = fields.integer("format_version")
    if version > FORMAT_VERSION:
        raise fields.error(
            f"field format_version is {version}, but this supra reads up to {FORMAT_VERSION}: "
            "upgrade supra"
        )
    if fields.text("hidden_act", default="silu") not in ("silu", "gelu_pytorch_tanh"):
        raise fields.error("field hidden_act must be silu or gelu_pytorch_tanh")
    stated = {name: config[name] for name in SPEC_FIELDS if name in config}
    stated["eos_token_id"] = list(fields.tokens("eos_token_id"))
    try:
        spec = ModelSpec.from_dict({**stated, "layers": _layers(fields)})
    except SpecError as error:
        message = _LAYER.sub(lambda at: f"mixers.{config['layer_mixers'][int(at[1])]}", str(error))
        raise fields.located(SpecError(message)) from None
    _check_repeated(fields, spec)
    return spec


def _layers(fields: Fields) -> list[dict[str, Any]]:
    mixers, indices = _table(fields, "mixers"), _table(fields, "layer_mixers")
    for number, mixer in enumerate(mixers):
        if len(json.dumps(mixer)) > _MIXER_LENGTH:
            raise fields.error(f"field mixers holds at {number} more than any mixer states")
    for index in indices:
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(mixers):
            raise fields.error(
                f"field layer_mixers holds {index!r}, which is not an index into mixers"
            )
    kinds = fields.values.get("layer_feed_forwards")
    kinds = ["dense"] * len(indices) if kinds is None else kinds
    if not isinstance(kinds, list) or len(kinds) != len(indices):
        raise fields.error(
            f"field layer_feed_forwards must be a list with one entry for each of {len(indices)} "
            "layers"
        )
    return [
        {"mixer": mixers[index], "feed_forward": kind}
        for index, kind in zip(indices, kinds, strict=True)
    ]


def _table(fields: Fields, name: str) -> list[Any]:
    value = fields.values.get(name)
    if not isinstance(value, list) or not 0 < len(value) <= MOST_LAYERS:
        raise fields.error(f"field {name} must be a list with 1 to {MOST_LAYERS} entries")
    return value


def _check_repeated(fields: Fields, spec: ModelSpec) -> None:
    """Fields for other programs must agree with the spec."""
    repeated = {
        "num_hidden_layers": spec.num_hidden_layers,
        "layer_types": [layer.mixer.layer_type for layer in spec.layers],
    }
    for name, expected in repeated.items():
        if name in fields.values and fields.values[name] != expected:
            raise fields.error(f"field {name} contradicts layer_mixers, which gives {expected}")
