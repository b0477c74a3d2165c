"""Phi-3 and Phi-4: q, k and v in one matrix, gate and up in another, rope perhaps over a part."""

from __future__ import annotations

from typing import Any

from supra_core.families.shared import features as has
from supra_core.families.shared.common import (
    config_from_spec,
    spec_from_fields,
    uniform_mixers,
)
from supra_core.families.shared.fields import Fields
from supra_core.families.shared.tensors import fused, parts, split_name
from supra_core.mixers.positions import LongropeScaling
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor, TensorSource

MODEL_TYPE = "phi3"
# What transformers takes where the config states none.
_ORIGINAL_POSITIONS = 4096


def to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    fields = Fields(config, where)
    return spec_from_fields(
        fields,
        MODEL_TYPE,
        attention_bias="none",
        key_value_heads=None,
        max_positions=4096,
        mixers=uniform_mixers(fields, None),
        eps=1e-5,
        partial_rope=True,
        original_positions=_ORIGINAL_POSITIONS,
    )


def to_config(spec: ModelSpec) -> dict[str, Any]:
    config = config_from_spec(
        spec,
        MODEL_TYPE,
        "Phi3ForCausalLM",
        states={has.PARTIAL_ROPE},
        biases=("none",),
        scales=("longrope",),
        windows="one",
    )
    scaling = spec.rope.scaling
    return {
        **config,
        "partial_rotary_factor": spec.rope.fraction,
        "original_max_position_embeddings": (
            scaling.original_max_position_embeddings
            if isinstance(scaling, LongropeScaling)
            else spec.max_position_embeddings
        ),
    }


def to_canonical(spec: ModelSpec, tensors: TensorSource) -> dict[str, LazyTensor]:
    """Each fused matrix as the matrices it is made of."""
    canonical: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        layer, module, kind = split_name(name)
        rows = _rows(spec).get(module)
        if rows is None or tensor.shape[:1] != (sum(rows.values()),):
            # What has another shape is listed under its own name when names are checked.
            canonical[name] = tensor
            continue
        for part, piece in zip(rows, parts(tensor, tuple(rows.values())), strict=True):
            canonical[f"{layer}{part}.{kind}"] = piece
    return canonical


def from_canonical(spec: ModelSpec, tensors: TensorSource) -> dict[str, LazyTensor]:
    """The inverse of :func:`to_canonical`."""
    whole_of = {part: whole for whole, rows in _rows(spec).items() for part in rows}
    stored: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        layer, module, kind = split_name(name)
        whole = whole_of.get(module)
        if whole is None:
            stored[name] = tensor
        else:
            names = [f"{layer}{part}.{kind}" for part in _rows(spec)[whole]]
            stored[f"{layer}{whole}.{kind}"] = fused([tensors[part] for part in names])
    return stored


def _rows(spec: ModelSpec) -> dict[str, dict[str, int]]:
    """Which modules each fused one holds, in order, and how many rows each has."""
    key_value = spec.num_key_value_heads * spec.head_dim
    return {
        "self_attn.qkv_proj": {
            "self_attn.q_proj": spec.num_attention_heads * spec.head_dim,
            "self_attn.k_proj": key_value,
            "self_attn.v_proj": key_value,
        },
        "mlp.gate_up_proj": {
            "mlp.gate_proj": spec.intermediate_size,
            "mlp.up_proj": spec.intermediate_size,
        },
    }
