"""The stages: match every mixer's output, match the teacher's distribution, predict the text.

Each leaves gradients on the student and returns its loss. The first two run the teacher's forward
once a batch; ``transfer`` never runs backward through the stack: every layer gets the teacher's
own input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from supra_core.errors import SupraError
from supra_core.model import layout
from supra_core.model.spec import ModelSpec
from supra_torch.distributed.sharding import gathered
from supra_torch.model.context_parallel import Part
from supra_torch.model.layers import Positions, for_products
from supra_torch.model.lora import is_adapter
from supra_torch.model.model import SupraModel
from supra_torch.model.trunk import Layer, ModelState
from supra_torch.ops import linear_cross_entropy, linear_kl_divergence
from supra_torch.ops.losses import IGNORED
from supra_torch.recipes.config import ModelPart, Stage, StageKind
from supra_torch.uptrain.step import segments
from supra_torch.uptrain.step.batches import Batch
from supra_torch.uptrain.step.segments import States
from supra_torch.uptrain.step.step import adamw


def gradients(
    kind: StageKind,
    student: SupraModel,
    teacher: SupraModel | None,
    batch: Batch,
    share: float = 1.0,
    segment: int = 0,
) -> Tensor:
    """Accumulate the gradients of a stage's loss on a batch, times ``share``; returns both.

    ``share``: of the batch that these rows are; every loss is a mean over rows. ``segment``: the
    student computes so many tokens of a row at a time (0: all). Nothing here waits for the device.
    """
    if kind == "uptrain":
        return uptrain(student, batch, share, segment)
    if teacher is None:
        raise ValueError(f"a {kind} stage needs a teacher")
    if kind == "transfer":
        return transfer(student, teacher, batch, share, segment)
    return distill(student, teacher, batch, share, segment)


def transfer(
    student: SupraModel, teacher: SupraModel, batch: Batch, share: float = 1.0, segment: int = 0
) -> Tensor:
    """Accumulate gradients of every linear mixer's error.

    The error of a layer is the squared difference of the mixers' outputs over the teacher's
    mean square in the row, so that all layers count alike (stage 1 of LoLCATs, arXiv 2410.10254).
    Returns its mean over linear layers.
    """
    total, linear = torch.zeros((), dtype=torch.float64, device=batch.ids.device), 0
    pieces, places = segments.parts(batch.own.stop - batch.own.start, segment), None
    for ours, x, target, positions in teacher_forced(student, teacher, batch):
        # The positions are those of all layers.
        places = places or _places(positions, pieces)
        if is_converted(ours):
            total += _match(ours, x, target, pieces, places, share, batch)
            linear += 1
    return total / max(linear, 1)


def _places(positions: Positions, pieces: Sequence[slice]) -> dict[int, Positions]:
    """The positions of every piece of the rows, by its first token."""
    if len(pieces) == 1:
        return {pieces[0].start: positions}
    return {part.start: positions.part(part) for part in pieces}


def _match(
    ours: Layer,
    x: Tensor,
    target: Tensor,
    pieces: Sequence[slice],
    places: Mapping[int, Positions],
    share: float,
    batch: Batch,
) -> Tensor:
    """Accumulate the gradients of one mixer's error on x, times ``share``; returns both."""
    scale = _mean_square(target, batch.part).clamp(min=1e-12)
    tokens = batch.ids.shape[1]

    def run(part: slice, before: States | None) -> tuple[Tensor, States]:
        state, own = None if before is None else before[0], places[part.start]
        output, after = ours.mix(x[:, part], own, state, remember=len(pieces) > 1)
        return output, [after]

    def error(output: Tensor, part: slice) -> Tensor:
        squares = (output.float() - target[:, part].float()).square() / scale
        return squares.mean() * (share * output.shape[1] / tokens)

    return segments.backward(run, error, pieces)


def _mean_square(x: Tensor, part: Part | None = None) -> Tensor:
    """Of every row of x (B, T, D): (B, 1, 1) in float32, however many threads share the sum.

    ``part``: of the rows that x is.
    """
    total = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float64).square()
    numbers = x[0].numel()
    if part is not None:
        total, numbers = part.sum(total), numbers * part.count
    return (total / numbers).float()


def teacher_forced(
    student: SupraModel, teacher: SupraModel, batch: Batch
) -> Iterator[tuple[Layer, Tensor, Tensor, Positions]]:
    """Layer by layer on a batch: the student's layer and what its mixer is to do.

    That is the teacher's mixer input and its output, both (B, T, D) and without gradients, and
    the positions, of the tokens that this process computes. Errors of one layer do not reach the
    next.
    """
    positions = batch.positions(teacher).joined(batch.positions(student))
    with torch.no_grad(), gathered(teacher):
        h = teacher.embed(batch.ids[:, batch.own])
    for ours, theirs in zip(student.model.layers, teacher.model.layers, strict=True):
        assert isinstance(ours, Layer) and isinstance(theirs, Layer)
        with torch.no_grad(), gathered(theirs):
            x = theirs.mixer_input(h)
            target, _ = theirs.self_attn(x, positions, None, None)
            h = theirs.add_mixed(h, target)
            h = h + theirs.feed_forward(h)
        yield ours, x, target, positions


def distill(
    student: SupraModel, teacher: SupraModel, batch: Batch, share: float = 1.0, segment: int = 0
) -> Tensor:
    """Accumulate gradients of KL(teacher || student), the mean over tokens in nats."""
    with torch.no_grad():
        target = last_hidden(teacher, batch)

    def divergence(hidden: Tensor, part: slice) -> Tensor:
        loss = linear_kl_divergence(
            for_products(hidden).flatten(0, 1),
            student.head_weight,
            target[:, part].flatten(0, 1),
            teacher.head_weight,
            softcap=student.spec.logits_softcap,
            teacher_softcap=teacher.spec.logits_softcap,
        )
        return loss * (share * hidden.shape[1] / batch.ids.shape[1])

    return _in_segments(student, batch, divergence, segment)


def uptrain(student: SupraModel, batch: Batch, share: float = 1.0, segment: int = 0) -> Tensor:
    """Accumulate gradients of :func:`next_token_loss`."""
    targets, divisor = next_tokens(batch)[:, batch.own], _targets(batch)

    def loss(hidden: Tensor, part: slice) -> Tensor:
        return _cross_entropy(student, hidden, targets[:, part], divisor) * share

    return _in_segments(student, batch, loss, segment)


def _in_segments(
    student: SupraModel, batch: Batch, loss: Callable[[Tensor, slice], Tensor], segment: int
) -> Tensor:
    """Accumulate the gradients of a loss of the last hidden states, so many tokens at a time."""
    ids = batch.ids[:, batch.own]
    pieces = segments.parts(ids.shape[1], segment)
    places = _places(batch.positions(student), pieces)
    seen = torch.zeros_like(ids[:, 0])

    def run(part: slice, before: States | None) -> tuple[Tensor, States]:
        hidden, after = student.hidden(
            ids[:, part],
            None if before is None else ModelState(seen, tuple(before)),
            remember=len(pieces) > 1,
            positions=places[part.start],
        )
        return hidden, after.layers

    return segments.backward(run, loss, pieces)


def next_token_loss(model: SupraModel, batch: Batch) -> Tensor:
    """Mean over all tokens but each row's first of -log p(token | before), in nats.

    What begins a document inside a row counts as 0: nothing before it is its own. Of rows that
    processes share, this one's tokens' part of the mean.
    """
    targets = next_tokens(batch)[:, batch.own]
    return _cross_entropy(model, last_hidden(model, batch), targets, _targets(batch))


def next_tokens(batch: Batch) -> Tensor:
    """What follows each token, (B, T); ``IGNORED`` where that is no token of its document."""
    targets = batch.ids.flatten()
    if batch.cu_seqlens is not None:
        # The last border is behind the last token.
        targets = F.pad(targets, (0, 1)).index_fill(0, batch.cu_seqlens.long(), IGNORED)[:-1]
    return F.pad(targets.view_as(batch.ids)[:, 1:], (0, 1), value=IGNORED)


def _targets(batch: Batch) -> int:
    """How many tokens a batch's loss is the mean of: all but each row's first."""
    return batch.ids.numel() - len(batch.ids)


def _cross_entropy(model: SupraModel, hidden: Tensor, targets: Tensor, divisor: int) -> Tensor:
    """The sum over tokens of -log p(target) over ``divisor``; hidden (B, T, D), targets (B, T)."""
    return linear_cross_entropy(
        for_products(hidden).flatten(0, 1),
        model.head_weight,
        targets.flatten(),
        divisor=divisor,
        softcap=model.spec.logits_softcap,
    )


def last_hidden(model: SupraModel, batch: Batch) -> Tensor:
    """As the head receives them, (B, T, D), of the tokens that this process computes."""
    ids = batch.ids[:, batch.own]
    return model.hidden(ids, remember=False, positions=batch.positions(model))[0]


def is_converted(layer: Layer) -> bool:
    """Whether conversion made the layer's mixer."""
    return layer.self_attn.mixer.converted


def optimiser_for(student: SupraModel, stage: Stage, *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over what the stage trains; everything else is frozen, experts and routers always.

    Nothing here would keep a router's choices balanced, as it was trained to. Weights the
    transformer had and those that linearizing added have each their rate; weight decay is for
    matrices that the transformer had. Raises SupraError when nothing is trained.
    """
    trained = list(_trained(student, stage))
    if not trained:
        raise SupraError(
            f"the {stage.kind} stage has nothing to train: give it a learning rate, or leave it out"
        )
    return adamw(trained, stage, fused=fused)


def _trained(student: SupraModel, stage: Stage) -> Iterator[tuple[nn.Parameter, float, float]]:
    """What the stage trains: parameter, peak learning rate, weight decay."""
    new, rate_of = _new_names(student.spec), learning_rates(stage, student.spec)
    for name, parameter in student.named_parameters():
        rate = rate_of(name)
        parameter.requires_grad_(rate > 0)
        if parameter.requires_grad:
            decayed = parameter.dim() >= 2 and name not in new and not is_adapter(name)
            yield parameter, rate, stage.weight_decay if decayed else 0.0


def learning_rates(stage: Stage, spec: ModelSpec) -> Callable[[str], float]:
    """The peak learning rate of a parameter by its name; 0 for one that the stage leaves alone."""
    new = _new_names(spec)

    def rate_of(name: str) -> float:
        in_reach = stage.kind != "transfer" or _in_linear_mixer(spec, name)
        if not in_reach or _part(name) in stage.freeze or layout.is_of_experts(name):
            return 0.0
        if name in new:
            return stage.new_learning_rate
        return stage.learning_rate if stage.lora_rank is None or is_adapter(name) else 0.0

    return rate_of


def _part(name: str) -> ModelPart | Literal["mixers"]:
    """The part of the model that a parameter of the canonical layout belongs to."""
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        return "embeddings"
    if ".self_attn." in name:
        return "mixers"
    return "feed_forward" if ".mlp." in name else "norms"


def _in_linear_mixer(spec: ModelSpec, name: str) -> bool:
    return any(
        name.startswith(layout.layer_prefix(index) + "self_attn.")
        for index, layer in enumerate(spec.layers)
        if layer.mixer.converted
    )


def _new_names(spec: ModelSpec) -> set[str]:
    """Names of the tensors that linearizing added."""
    return {
        f"{layout.layer_prefix(index)}self_attn.{name}"
        for index, layer in enumerate(spec.layers)
        for name in layer.mixer.new_tensors(spec)
    }
