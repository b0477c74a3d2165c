"""The canonical layout: from a spec, the name and shape of every tensor.

Names are Hugging Face's for Llama, plus the tensors that linear attention and other families
add. A projection's weight is stored (out, in), as everywhere in that ecosystem.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod

from supra_core.errors import LayoutError
from supra_core.model.spec import (
    Experts,
    Folded,
    LayerSpec,
    LearnedDecay,
    LinearAttention,
    ModelSpec,
    Projection,
    SoftmaxAttention,
    SumNormaliser,
)

Shape = tuple[int, ...]

_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")

# Read and written in float32 whatever the model's type: small, and their rounding is not.
FLOAT32_SUFFIXES = ("self_attn.log_slope", "self_attn.log_far_gain", "self_attn.log_sink")


def tensor_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Every tensor of the canonical layout, in file order."""
    return dict(_tensors(spec))


def layer_prefix(index: int) -> str:
    """What the names of layer ``index`` begin with, the dot included."""
    return f"model.layers.{index}."


def mixer_shapes(spec: ModelSpec, mixer: SoftmaxAttention | LinearAttention) -> dict[str, Shape]:
    """The tensors of one mixer, named relative to ``self_attn.``."""
    return dict(_mixer_tensors(spec, mixer))


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
        for name, shape in _mixer_tensors(spec, layer.mixer):
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


def _mixer_tensors(
    spec: ModelSpec, mixer: SoftmaxAttention | LinearAttention
) -> Iterator[tuple[str, Shape]]:
    D, H, K = spec.hidden_size, spec.num_attention_heads, spec.num_key_value_heads
    size, bias = spec.head_dim, spec.attention_bias != "none"
    qk_bias = bias
    if isinstance(mixer, LinearAttention) and isinstance(mixer.feature_map.projection, Folded):
        size = mixer.feature_map.size
        qk_bias = mixer.feature_map.projection.bias
    for name, heads, width, has_bias in (
        ("q_proj", H, size, qk_bias),
        ("k_proj", K, size, qk_bias),
        ("v_proj", K, spec.value_head_dim, bias),
    ):
        yield f"{name}.weight", (heads * width, D)
        if has_bias:
            yield f"{name}.bias", (heads * width,)
    yield "o_proj.weight", (D, H * spec.value_head_dim)
    if spec.attention_bias == "qkvo":
        yield "o_proj.bias", (D,)
    for name, heads in (("q_proj_norm", H), ("k_proj_norm", K)):
        if spec.query_key_norm != "none":
            shared = spec.query_key_norm == "per_head"
            yield f"{name}.weight", (spec.head_dim if shared else heads * spec.head_dim,)
    if isinstance(mixer, LinearAttention):
        yield from _linear_tensors(spec, mixer)


def _linear_tensors(spec: ModelSpec, mixer: LinearAttention) -> Iterator[tuple[str, Shape]]:
    H, K, d = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
    phi = mixer.feature_map
    if isinstance(phi.projection, Projection):
        maps = [("q_feature", H)] if phi.projection.shared else [("q_feature", H), ("k_feature", K)]
        for name, heads in maps:
            if phi.projection.scope == "all_heads":
                weight, bias = (heads * phi.size, heads * d), (heads * phi.size,)
            else:
                weight, bias = (heads, phi.size, d), (heads, phi.size)  # type: ignore[assignment]
            yield f"{name}.weight", weight
            if phi.projection.bias:
                yield f"{name}.bias", bias
    if mixer.qk_norm:
        yield "q_norm.weight", (H * phi.output_size,)
        yield "k_norm.weight", (H * phi.output_size,)
    if isinstance(mixer.decay, LearnedDecay):
        yield "log_slope", (H,)
    if mixer.gain != "none":
        yield "gain", (H,) if mixer.gain == "per_head" else (H, spec.value_head_dim)
    if mixer.window is not None:
        yield "log_far_gain", (H,)
    if isinstance(mixer.normaliser, SumNormaliser) and mixer.normaliser.sink:
        yield "log_sink", (H,)
