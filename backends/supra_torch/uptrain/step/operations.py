"""Floating-point operations of training: what a token costs, and the share a device was busy.

A weight that is multiplied costs a multiplication and an addition a token forward, and twice that
backward (arXiv 2001.08361), once where it is not trained. Attention is left out, and so is what is
computed twice to save memory, as in the model FLOPs utilisation of PaLM (arXiv 2204.02311, appendix
B). Of a mixture of experts, those that a token goes through count.
"""

from __future__ import annotations

from math import prod

from supra_core.model import layout
from supra_core.model.original import original_spec
from supra_core.model.spec import ModelSpec
from supra_torch.recipes.config import Stage
from supra_torch.uptrain.step.stages import learning_rates

_EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
_READ_THE_INPUT = ("q_proj", "k_proj", "v_proj")


def multiplied_weights(spec: ModelSpec) -> int:
    """Weights that every token is multiplied by: all but an embedding that is no head too."""
    looked_up = 0 if spec.tie_word_embeddings else spec.vocab_size * spec.hidden_size
    return layout.active_parameter_count(spec) - looked_up


def flops_per_token(stage: Stage, student: ModelSpec) -> int:
    """Of a stage; in ``transfer`` the teacher's layers and the student's linear mixers.

    What the stage does not train has no gradients of its own; adapters are not counted.
    """
    rate_of = learning_rates(stage, student)
    shapes = layout.tensor_shapes(student)
    # Experts, of which a token goes through a few, are never among the trained.
    trained = sum(prod(shape) for name, shape in shapes.items() if rate_of(name) > 0)
    if stage.kind == "transfer":
        read, others = _linear_mixers(student)
        # The teacher's states, which these read, have no gradients.
        return 2 * read + 4 * others + 2 * trained + 2 * _layers(original_spec(student))
    if not student.tie_word_embeddings and rate_of(_EMBEDDINGS[0]) > 0:
        trained -= prod(shapes[_EMBEDDINGS[0]])
    teachers = 2 * multiplied_weights(original_spec(student)) if stage.kind == "distill" else 0
    return 4 * multiplied_weights(student) + 2 * trained + teachers


def _linear_mixers(spec: ModelSpec) -> tuple[int, int]:
    """Weights of the linear mixers: those that read the layer's input, and the others."""
    read = others = 0
    for layer in spec.layers:
        if layer.mixer.converted:
            for name, shape in layer.mixer.tensors(spec).items():
                if name.split(".")[0] in _READ_THE_INPUT:
                    read += prod(shape)
                else:
                    others += prod(shape)
    return read, others


def _layers(spec: ModelSpec) -> int:
    shapes = layout.tensor_shapes(spec)
    stored = sum(prod(shape) for name, shape in shapes.items() if name not in _EMBEDDINGS)
    return stored - layout.idle_parameter_count(spec)
