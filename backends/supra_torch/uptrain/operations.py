"""Floating-point operations of training: what a token costs, and the share a device was busy.

A weight that is multiplied costs a multiplication and an addition a token forward, and twice that
backward (arXiv 2001.08361). Attention is left out, and so is what is computed twice to save
memory, as in the model FLOPs utilisation of PaLM (arXiv 2204.02311, appendix B). Of a mixture of
experts, those that a token goes through count.
"""

from __future__ import annotations

from math import prod

from supra_core import layout
from supra_core.spec import LinearAttention, ModelSpec
from supra_core.teacher import original_spec
from supra_torch.uptrain.config import Stage

_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


def multiplied_weights(spec: ModelSpec) -> int:
    """Weights that every token is multiplied by: all but an embedding that is no head too."""
    looked_up = 0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size
    return layout.active_parameter_count(spec) - looked_up


def flops_per_token(stage: Stage, student: ModelSpec) -> int:
    """Of a stage; in ``transfer`` the teacher's layers and the student's linear mixers.

    Weights beside adapters have no gradients of their own, nor have experts, which are never
    trained; the adapters are not counted.
    """
    own = 6 if stage.lora_rank is None else 4
    if stage.kind == "transfer":
        return own * _linear_mixers(student) + 2 * _layers(original_spec(student))
    teachers = 2 * multiplied_weights(original_spec(student)) if stage.kind == "distill" else 0
    untrained = 2 * _experts(student) if stage.lora_rank is None else 0
    return own * multiplied_weights(student) - untrained + teachers


def _linear_mixers(spec: ModelSpec) -> int:
    return sum(
        prod(shape)
        for layer in spec.layers
        if isinstance(layer.mixer, LinearAttention)
        for shape in layout.mixer_shapes(spec, layer.mixer).values()
    )


def _layers(spec: ModelSpec) -> int:
    shapes = layout.tensor_shapes(spec)
    stored = sum(prod(shape) for name, shape in shapes.items() if name not in _EMBEDDINGS)
    return stored - layout.idle_parameter_count(spec)


def _experts(spec: ModelSpec) -> int:
    """Weights of routers, and of the experts that a token goes through."""
    return layout.expert_parameter_count(spec) - layout.idle_parameter_count(spec)
