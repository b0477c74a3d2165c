"""Source architectures: each family's config to a spec, and back.

Adding a family is adding a module with ``MODEL_TYPE``, ``to_spec`` and ``to_config``, and its
row here. A module whose layers name tensors otherwise than the canonical layout has ``MODULES``,
from its names to the canonical ones; one that stores them otherwise has ``to_canonical`` and
``from_canonical``; one whose models cannot do without their BOS has ``NEEDS_BOS``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from supra_core.errors import SpecError
from supra_core.families import (
    gemma,
    gemma2,
    gemma3,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from supra_core.families.shared.tensors import inverse, renamed
from supra_core.mixers.positions import LongropeScaling
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor, TensorSource

Translate = Callable[[ModelSpec, TensorSource], dict[str, LazyTensor]]


@dataclass(frozen=True)
class Family:
    """One architecture: ``to_spec(config, where)`` and ``to_config(spec)``, and its tensors.

    ``to_canonical(spec, tensors)`` and ``from_canonical`` are each other's inverse.
    ``needs_bos``: its models make nothing of a text that does not begin with BOS.
    """

    model_type: str
    to_spec: Callable[[dict[str, Any], str], ModelSpec]
    to_config: Callable[[ModelSpec], dict[str, Any]]
    to_canonical: Translate
    from_canonical: Translate
    needs_bos: bool


def _family(module: Any) -> Family:
    modules: dict[str, str] = getattr(module, "MODULES", {})

    def to_canonical(spec: ModelSpec, tensors: TensorSource) -> dict[str, LazyTensor]:
        return renamed(tensors, modules)

    def from_canonical(spec: ModelSpec, tensors: TensorSource) -> dict[str, LazyTensor]:
        return renamed(tensors, inverse(modules))

    return Family(
        module.MODEL_TYPE,
        module.to_spec,
        module.to_config,
        getattr(module, "to_canonical", to_canonical),
        getattr(module, "from_canonical", from_canonical),
        getattr(module, "NEEDS_BOS", False),
    )


FAMILIES: dict[str, Family] = {
    module.MODEL_TYPE: _family(module)
    for module in (
        gemma, gemma2, gemma3, granite, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3,
        qwen3_moe, smollm3,
    )
}  # fmt: skip

# Models that hold a family of ours as their text part.
_WITH_IMAGES = {"gemma3": gemma3.MODEL_TYPE}


def config_to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    """The spec of a Hugging Face config; ``where`` names its file in errors."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in _WITH_IMAGES:
        raise SpecError(
            f"{where}: field model_type is {model_type!r}, a model of texts and images, of which "
            f"only the text model is supported: save that by itself, as {_WITH_IMAGES[model_type]}"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        stated = "is missing" if model_type is None else f"is {model_type!r}, which is unknown"
        raise SpecError(
            f"{where}: field model_type {stated}: known are {', '.join(sorted(FAMILIES))}, "
            "supra and openlm"
        )
    return FAMILIES[model_type].to_spec(config, where)


def spec_to_config(spec: ModelSpec) -> dict[str, Any]:
    """A Hugging Face config for a plain transformer, of the family it came from if possible.

    :class:`SpecError` if it would be read as another model.
    """
    family = family_of(spec)
    config = family.to_config(spec)
    again = family.to_spec(config, f"the {family.model_type} config")
    if replace(again, provenance=spec.provenance) != spec:
        scaling = spec.rope.scaling
        chosen = isinstance(scaling, LongropeScaling) and scaling.factors == "long"
        raise SpecError(
            f"the model differs from what {family.model_type} can state"
            + (", since the long factors of its longrope were chosen" if chosen else "")
            + ": write it as supra instead"
            + (", or convert it with `rope_factors=short`" if chosen else "")
        )
    return config


def needs_bos(spec: ModelSpec) -> bool:
    """Whether the model, or the one that it was made from, makes nothing of a text without BOS."""
    family = FAMILIES.get(spec.provenance.family)
    return family is not None and family.needs_bos


def family_of(spec: ModelSpec) -> Family:
    """The family a plain transformer came from, or the one of Llama's shape that fits."""
    windowed = any(not mixer.converted and mixer.window is not None for mixer in spec.mixers)
    family = spec.provenance.family
    if family not in FAMILIES or (windowed and family == llama.MODEL_TYPE):
        family = mistral.MODEL_TYPE if windowed else llama.MODEL_TYPE
    return FAMILIES[family]
