"""The two stages: match every mixer's output, then match the teacher's distribution.

Both run the teacher's forward once a batch and leave gradients on the student. ``transfer``
never runs backward through the stack: every layer gets the teacher's own input.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from supra_core import layout
from supra_core.spec import LinearAttention, ModelSpec, SoftmaxAttention
from supra_torch.model import Layer, SupraModel
from supra_torch.ops import linear_kl_divergence
from supra_torch.uptrain.config import Stage


def transfer(student: SupraModel, teacher: SupraModel, ids: Tensor) -> float:
    """Accumulate gradients of every linear mixer's error; ids (B, T).

    The error of a layer is the squared difference of the mixers' outputs over the teacher's
    mean square, so that all layers count alike (stage 1 of LoLCATs, arXiv 2410.10254). Returns
    its mean over linear layers.
    """
    total, linear = 0.0, 0
    positions = teacher.positions(ids)
    with torch.no_grad():
        h = teacher.embed(ids)
    for ours, theirs in zip(student.model.layers, teacher.model.layers, strict=True):
        assert isinstance(ours, Layer) and isinstance(theirs, Layer)
        with torch.no_grad():
            x = theirs.input_layernorm(h)
            target, _ = theirs.self_attn(x, positions, None, None)
        if is_linear(ours):
            output, _ = ours.self_attn(x, positions, None, None)
            scale = target.float().square().mean().clamp(min=1e-12)
            loss = (output.float() - target.float()).square().mean() / scale
            loss.backward()  # type: ignore[no-untyped-call]
            total, linear = total + loss.item(), linear + 1
        with torch.no_grad():
            h = h + target
            h = h + theirs.mlp(theirs.post_attention_layernorm(h))
    return total / max(linear, 1)


def distill(student: SupraModel, teacher: SupraModel, ids: Tensor) -> float:
    """Accumulate gradients of KL(teacher || student), the mean over tokens in nats; ids (B, T)."""
    with torch.no_grad():
        target, _ = teacher.hidden(ids)
    hidden, _ = student.hidden(ids)
    dtype = target.dtype
    loss = linear_kl_divergence(
        hidden.flatten(0, 1).to(dtype),
        student.head_weight,
        target.flatten(0, 1),
        teacher.head_weight,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def is_linear(layer: Layer) -> bool:
    """Whether the layer's mixer is linear attention."""
    return hasattr(layer.self_attn, "mixer")


def optimiser_for(student: SupraModel, stage: Stage) -> torch.optim.AdamW:
    """AdamW over what the stage trains; everything else is frozen.

    Two groups: weights the transformer had, and those that linearizing added; weight decay is
    for matrices only.
    """
    new = _new_names(student.spec)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        rate = stage.new_learning_rate if name in new else stage.learning_rate
        trained = rate > 0 and (stage.kind == "distill" or _in_linear_mixer(student.spec, name))
        parameter.requires_grad_(trained)
        if trained:
            groups.setdefault((name in new, parameter.dim() >= 2), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "peak": stage.new_learning_rate if is_new else stage.learning_rate,
                "weight_decay": stage.weight_decay if matrix and not is_new else 0.0,
            }
            for (is_new, matrix), parameters in groups.items()
        ],
        lr=0.0,
        betas=(stage.beta1, stage.beta2),
        fused=True,
    )


def trained_parameters(optimiser: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """Every parameter an optimiser changes."""
    for group in optimiser.param_groups:
        yield from group["params"]


def _in_linear_mixer(spec: ModelSpec, name: str) -> bool:
    return any(
        name.startswith(layout.layer_prefix(index) + "self_attn.")
        for index, layer in enumerate(spec.layers)
        if isinstance(layer.mixer, LinearAttention)
    )


def _new_names(spec: ModelSpec) -> set[str]:
    """Names of the tensors that linearizing added."""
    kept = layout.mixer_shapes(spec, SoftmaxAttention())
    return {
        f"{layout.layer_prefix(index)}self_attn.{name}"
        for index, layer in enumerate(spec.layers)
        for name in layout.mixer_shapes(spec, layer.mixer)
        if name not in kept
    }
