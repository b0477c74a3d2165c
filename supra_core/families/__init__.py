"""Source architectures: each family's config to a spec, and back.

Adding a family is adding a module with ``MODEL_TYPE``, ``to_spec`` and ``to_config``, and its
row here. Both families so far store their tensors under the canonical names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from supra_core.errors import SpecError
from supra_core.families import llama, mistral
from supra_core.spec import ModelSpec, SoftmaxAttention


@dataclass(frozen=True)
class Family:
    """One architecture: ``to_spec(config, where)`` and ``to_config(spec)``."""

    model_type: str
    to_spec: Callable[[dict[str, Any], str], ModelSpec]
    to_config: Callable[[ModelSpec], dict[str, Any]]


FAMILIES: dict[str, Family] = {
    module.MODEL_TYPE: Family(module.MODEL_TYPE, module.to_spec, module.to_config)
    for module in (llama, mistral)
}


def config_to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    """The spec of a Hugging Face config; ``where`` names its file in errors."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        stated = "is missing" if model_type is None else f"is {model_type!r}, which is unknown"
        raise SpecError(
            f"{where}: field model_type {stated}: known are {', '.join(sorted(FAMILIES))}, "
            "supra and openlm"
        )
    return FAMILIES[model_type].to_spec(config, where)


def spec_to_config(spec: ModelSpec) -> dict[str, Any]:
    """A Hugging Face config for a plain transformer, of the family it came from if possible."""
    windowed = any(
        isinstance(layer.mixer, SoftmaxAttention) and layer.mixer.window is not None
        for layer in spec.layers
    )
    family = spec.provenance.family
    if family not in FAMILIES or windowed:
        family = mistral.MODEL_TYPE if windowed else llama.MODEL_TYPE
    return FAMILIES[family].to_config(spec)
