"""The published SUPRA layout's tensors under canonical names, and back.

Tensors are renamed; the packed ``in_proj`` (rows q, k, v) and ``w12`` (gate, up) are split and
joined when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from supra_core.errors import FormatError
from supra_core.model.layout import layer_prefix, mismatches, tensor_shapes
from supra_core.model.spec import ModelSpec
from supra_core.tensors import Array, LazyTensor, TensorSource

# Prefixes of every name in data-parallel, compiled and hub models.
_WRAPPERS = ("module.", "_orig_mod.", "model.")


def canonical_tensors(
    spec: ModelSpec, tensors: Mapping[str, LazyTensor], where: str
) -> dict[str, LazyTensor]:
    """OpenLM tensors under canonical names, checked against ``spec``."""
    stored = _unwrapped(tensors, where)
    if spec.tie_word_embeddings:
        # Some writers store a tied matrix once, under either name.
        names = ("tok_embeddings.weight", "output.weight")
        stored |= {n: stored[m] for n, m in (names, names[::-1]) if n not in stored and m in stored}
    _check(spec, {name: tensor.shape for name, tensor in stored.items()}, where)
    if spec.tie_word_embeddings:
        stored["tok_embeddings.weight"] = _checked_tie(stored, where)
    found: dict[str, LazyTensor] = {}
    for name, parts in _correspondence(spec):
        start = 0
        for part, shape in parts:
            found[part] = _rows(stored[name], start, shape) if len(parts) > 1 else stored[name]
            start += shape[0]
    return {name: found[name] for name in tensor_shapes(spec)}


def published_tensors(spec: ModelSpec, tensors: TensorSource) -> dict[str, LazyTensor]:
    """Canonical tensors under OpenLM's names; tied models state both embeddings."""
    written: dict[str, LazyTensor] = {}
    for name, parts in _correspondence(spec):
        pieces = [tensors[part] for part, _ in parts]
        written[name] = pieces[0] if len(pieces) == 1 else _joined(pieces)
    if spec.tie_word_embeddings:
        written["output.weight"] = written["tok_embeddings.weight"]
    return written


def _check(spec: ModelSpec, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raise one error that lists missing, unexpected and misshapen OpenLM tensors."""
    expected = {
        name: (sum(shape[0] for _, shape in parts), *parts[0][1][1:])
        for name, parts in _correspondence(spec)
    }
    if spec.tie_word_embeddings:
        expected["output.weight"] = expected["tok_embeddings.weight"]
    if problems := mismatches(expected, found):
        raise FormatError(
            f"{where}: tensors do not match the OpenLM config ({problems}): name the config that "
            "belongs to these weights"
        )


def _correspondence(
    spec: ModelSpec,
) -> Iterator[tuple[str, list[tuple[str, tuple[int, ...]]]]]:
    """Each OpenLM tensor with the canonical tensors whose rows it holds, in order."""
    shapes = tensor_shapes(spec)

    def rows(*names: str) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, shapes[name]) for name in names]

    yield "tok_embeddings.weight", rows("model.embed_tokens.weight")
    if spec.embedding_norm:
        yield "post_embed_norm.weight", rows("model.embed_norm.weight")
    for index in range(spec.num_hidden_layers):
        prefix, layer = layer_prefix(index), f"layers.{index}."
        attention = prefix + "self_attn."
        packed = [attention + name for name in ("q_proj.weight", "k_proj.weight", "v_proj.weight")]
        yield layer + "attention.in_proj.weight", rows(*packed)
        yield layer + "attention.out_proj.weight", rows(attention + "o_proj.weight")
        for ours, theirs in (
            ("q_feature.weight", "_totrain_embed.weight"),
            ("q_feature.bias", "_totrain_embed.bias"),
            ("k_feature.weight", "_totrain_embed_kv.weight"),
            ("k_feature.bias", "_totrain_embed_kv.bias"),
            ("q_norm.weight", "_totrain_q_norm.weight"),
            ("k_norm.weight", "_totrain_k_norm.weight"),
        ):
            if attention + ours in shapes:
                yield f"{layer}attention.{theirs}", rows(attention + ours)
        gated = (prefix + "mlp.gate_proj.weight", prefix + "mlp.up_proj.weight")
        yield layer + "feed_forward.w12.weight", rows(*gated)
        yield layer + "feed_forward.w3.weight", rows(prefix + "mlp.down_proj.weight")
        yield layer + "attention_norm.weight", rows(prefix + "input_layernorm.weight")
        yield layer + "ffn_norm.weight", rows(prefix + "post_attention_layernorm.weight")
    yield "norm.weight", rows("model.norm.weight")
    if not spec.tie_word_embeddings:
        yield "output.weight", rows("lm_head.weight")


def _unwrapped(tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor]:
    """Names without the prefixes that wrappers add, and without rotary tables."""
    stored: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        bare = name
        while bare.startswith(_WRAPPERS):
            bare = bare.split(".", 1)[1]
        if bare.endswith(".inv_freq"):
            continue
        if bare in stored:
            raise FormatError(f"{where}: {bare} is there twice, also as {name}: keep one of them")
        stored[bare] = tensor
    return stored


def _rows(tensor: LazyTensor, start: int, shape: tuple[int, ...]) -> LazyTensor:
    return tensor.map(shape, lambda array: array[start : start + shape[0]])


def _joined(pieces: list[LazyTensor]) -> LazyTensor:
    shape = (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])
    return LazyTensor(
        shape, pieces[0].dtype, lambda: np.concatenate([piece.read() for piece in pieces])
    )


def _checked_tie(stored: Mapping[str, LazyTensor], where: str) -> LazyTensor:
    embedding, output = stored["tok_embeddings.weight"], stored["output.weight"]

    def check(array: Array) -> Array:
        if not np.array_equal(array, output.read()):
            raise FormatError(
                f"{where}: weight_tying is true, but tok_embeddings and output differ: correct "
                "the config"
            )
        return array

    return embedding.map(embedding.shape, check)
