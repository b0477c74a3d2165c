"""The canonical layout: from a spec, the name and shape of every tensor.

Names are Hugging Face's for Llama, plus the tensors that linear attention and other families
add. A projection's weight is stored (out, in), as everywhere in that ecosystem.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod

from supra_core.errors import LayoutError
from supra_core.mixers import FLOAT32_TENSORS
from supra_core.mixers.base import Shape
from supra_core.model.spec import Experts, LayerSpec, ModelSpec

_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")

# Read and written in float32 whatever the model's type: small, and their rounding is not.
FLOAT32_SUFFIXES = tuple(f"self_attn.{name}" for name in FLOAT32_TENSORS)


def tensor_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Every tensor of the canonical layout, in file order."""
    return dict(_tensors(spec))


def layer_prefix(index: int) -> str:
    """What the names of layer ``index`` begin with, the dot included."""
    return f"model.layers.{index}."


def parameter_count(spec: ModelSpec) -> int:
    """Stored parameters; tied embeddings count once."""
    return sum(prod(shape) for shape in tensor_shapes(spec).values())


def active_parameter_count(spec: ModelSpec) -> int:
    """The parameters that one token goes through: of a mixture, those of its own experts."""
    return parameter_count(spec) - idle_parameter_count(spec)


def idle_parameter_count(spec: ModelSpec) -> int:
    """The parameters of the experts that one token passes by, in all layers."""
    if spec.experts is None:
        return 0
    idle = spec.experts.count - spec.experts.per_token
    return expert_layers(spec) * idle * 3 * spec.hidden_size * spec.experts.intermediate_size


def expert_layers(spec: ModelSpec) -> int:
    """How many layers have a mixture of experts."""
    return sum(layer.feed_forward == "experts" for layer in spec.layers)


def stacked_name(name: str) -> str:
    """What mlx-lm calls an expert's tensor or module, which is one for all of a layer's experts."""
    return _EXPERT.sub(".mlp.switch_mlp.", name)


def expert_number(name: str) -> int | None:
    """Which of its layer's experts a tensor or a module belongs to, if to any."""
    found = _EXPERT.search(name)
    return None if found is None else int(found[1])


def is_of_experts(name: str) -> bool:
    """Whether a tensor belongs to a mixture of experts: to its router or to an expert."""
    return ".mlp.gate." in name or ".mlp.experts." in name


def check_tensors(spec: ModelSpec, found: Mapping[str, Shape], where: str) -> None:
    """Raise :class:`LayoutError` naming every missing, unexpected or misshapen tensor."""
    if problems := mismatches(tensor_shapes(spec), found):
        raise LayoutError(
            f"{where}: tensors do not match config.json ({problems}): convert the model again or "
            "correct the config"
        )


def mismatches(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> str:
    """The first eight missing, unexpected or misshapen tensors; empty if there are none."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    more = [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
    return "; ".join([*problems[:8], *more])


def _tensors(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    D = spec.hidden_size
    yield "model.embed_tokens.weight", (spec.vocab_size, D)
    if spec.embedding_norm:
        yield "model.embed_norm.weight", (D,)
    for index, layer in enumerate(spec.layers):
        prefix = layer_prefix(index)
        if spec.block_norm != "after":
            yield prefix + "input_layernorm.weight", (D,)
        for name, shape in layer.mixer.tensors(spec).items():
            yield f"{prefix}self_attn.{name}", shape
        if spec.block_norm != "before":
            yield prefix + "mixer_output_norm.weight", (D,)
        if spec.block_norm != "after":
            yield prefix + "post_attention_layernorm.weight", (D,)
        for name, shape in _feed_forward_tensors(spec, layer):
            yield f"{prefix}mlp.{name}", shape
        if spec.block_norm != "before":
            yield prefix + "mlp_output_norm.weight", (D,)
    yield "model.norm.weight", (D,)
    if not spec.tie_word_embeddings:
        yield "lm_head.weight", (spec.vocab_size, D)


def _feed_forward_tensors(spec: ModelSpec, layer: LayerSpec) -> Iterator[tuple[str, Shape]]:
    if layer.feed_forward == "dense":
        width = spec.intermediate_size
        yield from _gated_tensors("", spec.hidden_size, width, bias=spec.mlp_bias)
        return
    assert isinstance(spec.experts, Experts)
    yield "gate.weight", (spec.experts.count, spec.hidden_size)
    for expert in range(spec.experts.count):
        width = spec.experts.intermediate_size
        yield from _gated_tensors(f"experts.{expert}.", spec.hidden_size, width)


def _gated_tensors(
    prefix: str, size: int, width: int, *, bias: bool = False
) -> Iterator[tuple[str, Shape]]:
    for name, rows, columns in (
        ("gate_proj", width, size), ("up_proj", width, size), ("down_proj", size, width),
    ):  # fmt: skip
        yield f"{prefix}{name}.weight", (rows, columns)
        if bias:
            yield f"{prefix}{name}.bias", (rows,)
