"""Mixtral: Mistral's attention, and a mixture of experts in every layer."""

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
from supra_core.families.shared.tensors import inverse, renamed
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor, TensorSource

MODEL_TYPE = "mixtral"

# What transformers assumes where a config says nothing; null means none, or as many.
_DEFAULT_KEY_VALUE_HEADS = 8
_PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    fields = Fields(config, where)
    mixers = uniform_mixers(fields, None)
    experts = experts_of(
        fields,
        count=8,
        per_token=2,
        intermediate_size=fields.integer("intermediate_size"),
        normalise=True,
    )
    return spec_from_fields(
        fields,
        MODEL_TYPE,
        attention_bias="none",
        key_value_heads=None if "num_key_value_heads" in config else _DEFAULT_KEY_VALUE_HEADS,
        max_positions=131072,
        mixers=mixers,
        eps=1e-5,
        base=1e6,
        feed_forwards=["experts"] * len(mixers),
        experts=experts,
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    experts = stated_experts(spec, MODEL_TYPE)
    config = config_from_spec(
        spec,
        MODEL_TYPE,
        "MixtralForCausalLM",
        states={has.EXPERTS},
        biases=("none",),
        windows="one",
    )
    return {
        **config,
        "intermediate_size": experts.intermediate_size,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
    }


def to_canonical(spec: ModelSpec, tensors: TensorSource) -> dict[str, LazyTensor]:
    """The experts under the canonical names."""
    return renamed(tensors, _modules(spec))


def from_canonical(spec: ModelSpec, tensors: TensorSource) -> dict[str, LazyTensor]:
    """The inverse of :func:`to_canonical`."""
    return renamed(tensors, inverse(_modules(spec)))


def _modules(spec: ModelSpec) -> dict[str, str]:
    """A layer's modules, from Mixtral's names to the canonical ones."""
    modules = {"block_sparse_moe.gate": "mlp.gate"}
    for ours in _PROJECTIONS.values():
        # As mlx-lm converts them.
        modules[f"block_sparse_moe.switch_mlp.{ours}"] = f"mlp.switch_mlp.{ours}"
    for expert in range(stated_experts(spec, MODEL_TYPE).count):
        for theirs, ours in _PROJECTIONS.items():
            modules[f"block_sparse_moe.experts.{expert}.{theirs}"] = f"mlp.experts.{expert}.{ours}"
    return modules
