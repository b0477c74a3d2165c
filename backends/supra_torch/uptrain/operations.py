"""Floating-point operations of training: what a token costs, and the share a device was busy.

A weight that is multiplied costs a multiplication and an addition a token forward, and twice that
backward (arXiv 2001.08361). Attention is left out, and so is what is computed twice to save
memory, as in the model FLOPs utilisation of PaLM (arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

from math import prod

from supra_core import layout
from supra_core.spec import LinearAttention, ModelSpec
from supra_torch.uptrain.config import StageKind

_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def multiplied_weights(spec: ModelSpec) -> int:
    """Weights that every token is multiplied by: all but an embedding that is no head too."""
    looked_up = 0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size
    return layout.parameter_count(spec) - looked_up


def flops_per_token(kind: StageKind, student: ModelSpec, teacher: ModelSpec | None) -> int:
    """Of a stage; in ``transfer`` the teacher's layers and the student's linear mixers."""
    if kind == "uptrain" or teacher is None:
        return 6 * multiplied_weights(student)
    if kind == "distill":
        return 6 * multiplied_weights(student) + 2 * multiplied_weights(teacher)
    return 6 * _linear_mixers(student) + 2 * _layers(teacher)


def _linear_mixers(spec: ModelSpec) -> int:
    return sum(
        prod(shape)
        for layer in spec.layers
        if isinstance(layer.mixer, LinearAttention)
        for shape in layout.mixer_shapes(spec, layer.mixer).values()
    )


def _layers(spec: ModelSpec) -> int:
    shapes = layout.tensor_shapes(spec)
    return sum(prod(shape) for name, shape in shapes.items() if name not in _EMBEDDINGS)
