"""A start without a gradient step: fit every linear mixer to its teacher in closed form.

Layer by layer and teacher-forced, from a few thousand tokens:

1. each head's scale of queries and keys, decay, sink and gain by search over a small grid, for
   the least squared error of the head's own output;
2. the output projection by ridge regression towards the transformer's own, not towards zero, so
   that heads which the linear form cannot follow change little. Its strength is chosen on tokens
   that the regression did not see.

The first tokens of a sequence are left out: their activations are huge and attention there is
trivial.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from supra_core.mixers.linear import LinearAttention
from supra_core.progress import Progress, silent
from supra_torch.model.layers import Positions, activate
from supra_torch.model.mixers.base import MixerModule
from supra_torch.model.mixers.linear import LinearMixer
from supra_torch.model.mixers.softmax import SoftmaxMixer
from supra_torch.model.model import SupraModel
from supra_torch.model.trunk import Layer

_FIRST = 8
# Sequences, and queries of each, that the heads are fitted on.
_SEQUENCES, _QUERIES = 8, 128
_TOGETHER = 4
_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
_HALF_LIVES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2**16)
_LOG_SINKS = (-9.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0)
_LOG_FAR_GAINS = (-2.0, 0.0, 2.0, 4.0, 6.0)
_RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class LayerFit:
    """A layer's squared error over the teacher's square, before and after."""

    layer: int
    before: float
    after: float


@torch.no_grad()
def calibrate(
    student: SupraModel,
    teacher: SupraModel,
    ids: Tensor,
    *,
    outputs: bool = True,
    progress: Progress = silent,
) -> list[LayerFit]:
    """Fit ``student``, in place, to what ``teacher`` computes on ids (N, T); N at least 2.

    The teacher is the transformer that the student was linearized from. ``outputs`` False leaves
    the output projections as they are: a better start for training, which has heads to improve.
    """
    pairs = zip(student.model.layers, teacher.model.layers, strict=True)
    layers = len(student.model.layers)
    return calibrate_layers(pairs, layers, student, teacher, ids, outputs, progress)  # type: ignore[arg-type]


@torch.no_grad()
def calibrate_layers(
    pairs: Iterable[tuple[Layer, Layer]],
    layers: int,
    student: SupraModel,
    teacher: SupraModel,
    ids: Tensor,
    outputs: bool,
    progress: Progress,
) -> list[LayerFit]:
    """:func:`calibrate` for pairs of layers, the student's and the teacher's, made one by one.

    Of ``student`` only the rotations are used, of ``teacher`` those and the embedding.
    """
    positions = teacher.positions(ids[:1]).joined(student.positions(ids[:1]))
    hidden = [teacher.embed(part) for part in ids.split(_TOGETHER)]
    fits = []
    for index, (ours, theirs) in enumerate(pairs):
        inputs = [theirs.mixer_input(h) for h in hidden]
        targets = [theirs.self_attn(x, positions, None, None)[0] for x in inputs]
        mixer = ours.self_attn
        if mixer.mixer.converted:
            before = _error(mixer, inputs, targets, positions)
            if mixer.can_search(theirs.self_attn):
                some, teacher_mixer = torch.cat(inputs)[:_SEQUENCES], theirs.self_attn
                _fit_heads(
                    cast(LinearMixer, mixer), cast(SoftmaxMixer, teacher_mixer), some, positions
                )
            if outputs:
                _fit_output(mixer, inputs, targets, positions)
            after = _error(mixer, inputs, targets, positions)
            fits.append(LayerFit(index, before, after))
        hidden = [theirs.add_mixed(h, y) for h, y in zip(hidden, targets, strict=True)]
        hidden = [h + theirs.feed_forward(h) for h in hidden]
        progress("calibrate", index + 1, layers)
    return fits


def _error(
    mixer: MixerModule, inputs: list[Tensor], targets: list[Tensor], positions: Positions
) -> float:
    """The mixer's squared error over the teacher's square."""
    wrong = total = 0.0
    for x, y in zip(inputs, targets, strict=True):
        target = y[:, _FIRST:].float()
        output, _ = mixer(x, positions, None, None)
        wrong += (output[:, _FIRST:].float() - target).square().sum().item()
        total += target.square().sum().item()
    return wrong / max(total, 1e-30)


# --- heads ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Attention:
    """What the heads of a layer see: some queries, all keys.

    q (B, H, Q, d), k (B, H, T, d) and v (B, H, T, Dv) in float32; age (Q, T), how many tokens a
    key is older than a query, negative for later ones; target (B, H, Q, Dv) the teacher's.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    age: Tensor
    target: Tensor


@dataclass(frozen=True)
class _Choice:
    """The best candidate for each head so far, all (H,)."""

    explained: Tensor
    scale: Tensor
    slope: Tensor
    log_sink: Tensor
    log_far_gain: Tensor
    gain: Tensor

    @staticmethod
    def none(heads: int, device: torch.device) -> _Choice:
        fields = (torch.full((heads,), x, device=device) for x in (-1.0, 1.0, 0.1, -9.0, 0.0, 1.0))
        return _Choice(*fields)

    def better(self, other: _Choice) -> _Choice:
        wins = other.explained > self.explained
        pairs = zip(vars(other).values(), vars(self).values(), strict=True)
        return _Choice(*(torch.where(wins, new, old) for new, old in pairs))


def _fit_heads(ours: LinearMixer, theirs: SoftmaxMixer, x: Tensor, positions: Positions) -> None:
    """Set each head's scales, decay, sink, far gain and gain by search; x (B, T, D)."""
    seen = _attention(theirs, x, positions)
    group = ours.heads // ours.key_value_heads
    # A group of heads shares its keys: their scale first, as if the queries had the same.
    # A window's scores are made of the same queries and keys, and are right as they are.
    scales = _SCALES if ours.mixer.window is None else (1.0,)
    by_scale = [_search(ours.mixer, seen, scale, scale) for scale in scales]
    totals = torch.stack([c.explained.view(-1, group).sum(-1) for c in by_scale])
    key_scale = torch.tensor(scales, device=x.device)[totals.argmax(0)]
    best = _Choice.none(ours.heads, x.device)
    for scale in scales:
        repeated = key_scale.repeat_interleave(group)
        best = best.better(_search(ours.mixer, seen, scale, repeated))
    assert ours.q_feature is not None and ours.k_feature is not None
    ours.q_feature.weight.mul_(best.scale[:, None, None])
    ours.k_feature.weight.mul_(key_scale[:, None, None])
    ours.log_slope.copy_(best.slope.log())
    ours.gain.copy_(best.gain.view(-1, *[1] * (ours.gain.dim() - 1)).expand_as(ours.gain))
    if ours.log_sink is not None:
        ours.log_sink.copy_(best.log_sink)
    if ours.mixer.window is not None:
        ours.log_far_gain.copy_(best.log_far_gain)


def _attention(theirs: SoftmaxMixer, x: Tensor, positions: Positions) -> _Attention:
    """The teacher's queries, keys, values and head outputs on x (B, T, D)."""
    with torch.autocast(x.device.type, enabled=False):
        theirs_x = x.to(theirs.q_proj.weight.dtype)
        q, k = theirs.rotated(theirs_x, positions)
        q, k, v = (z.float().transpose(1, 2) for z in (q, k, theirs.values(theirs_x)))
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], dim=1) for z in (k, v))
        T = x.shape[1]
        chosen = torch.linspace(min(_FIRST, T - 1), T - 1, min(_QUERIES, T), device=x.device).long()
        age = chosen[:, None] - torch.arange(T, device=x.device)
        allowed = age >= 0
        if theirs.window is not None:
            allowed &= age < theirs.window
        target = theirs.attend(q[:, :, chosen], k, v, allowed, causal=False)
    return _Attention(q[:, :, chosen], k, v, age, target)


def _search(
    mixer: LinearAttention, seen: _Attention, query_scale: float, key_scale: float | Tensor
) -> _Choice:
    """The best decay, sink and far gain of each head at given scales of queries and keys."""
    if isinstance(key_scale, Tensor):
        key_scale = key_scale[:, None, None]
    activation = mixer.feature_map.activation
    phi_q, phi_k = (activate(activation, z) for z in (seen.q * query_scale, seen.k * key_scale))
    similarity = phi_q @ phi_k.mT * mixer.key_scale
    near_sum, near_total = _near(mixer.window, seen)
    best = _Choice.none(seen.q.shape[1], seen.q.device)
    square = seen.target.square().sum((0, 2, 3)).clamp(min=1e-30)
    oldest = 0 if mixer.window is None else mixer.window
    for slope in (math.log(2) / half_life for half_life in _HALF_LIVES):
        decayed = torch.exp(-slope * (seen.age - oldest).clamp(min=0)) * (seen.age >= oldest)
        weights = similarity * decayed
        far_sum, far_total = weights @ seen.v, weights.sum(-1)
        for log_far_gain, log_sink in _weightings(mixer):
            factor = math.exp(log_far_gain)
            sink = 0.0 if log_sink is None else math.exp(log_sink)
            total = near_total + factor * far_total + sink * (far_total > 0)
            output = (near_sum + factor * far_sum) / total.clamp(min=1e-20)[..., None]
            along = (seen.target * output).sum((0, 2, 3)).clamp(min=0)
            own = output.square().sum((0, 2, 3)).clamp(min=1e-30)
            best = best.better(
                _Choice(
                    explained=along.square() / own / square,
                    scale=torch.full_like(own, query_scale),
                    slope=torch.full_like(own, slope),
                    log_sink=torch.full_like(own, -9.0 if log_sink is None else log_sink),
                    log_far_gain=torch.full_like(own, log_far_gain),
                    gain=along / own,
                )
            )
    return best


def _weightings(mixer: LinearAttention) -> Iterator[tuple[float, float | None]]:
    """Candidates for the logarithms of the far gain and of the sink."""
    for log_far_gain in (0.0,) if mixer.window is None else _LOG_FAR_GAINS:
        for log_sink in _LOG_SINKS if mixer.sink else (None,):
            yield log_far_gain, log_sink


def _near(window: int | None, seen: _Attention) -> tuple[Tensor, Tensor]:
    """The softmax window's weighted values (B, H, Q, Dv) and weights' sum (B, H, Q)."""
    if window is None:
        return torch.zeros_like(seen.target), torch.zeros_like(seen.target[..., 0])
    scores = seen.q @ seen.k.mT / math.sqrt(seen.q.shape[-1])
    inside = (seen.age >= 0) & (seen.age < window)
    # Scores of trained models stay far below what float32's exponential holds.
    weights = torch.exp(scores.clamp(max=60.0)) * inside
    return weights @ seen.v, weights.sum(-1)


# --- the output projection --------------------------------------------------------------------


def _fit_output(
    mixer: MixerModule, inputs: list[Tensor], targets: list[Tensor], positions: Positions
) -> None:
    """o_proj: min over W of |W o - y|^2 + ridge |W - W_0|^2, o the heads' outputs."""
    fitted, held = _moments(mixer, inputs, targets, positions)
    start = mixer.o_proj.weight.double()
    errors = [(_quadratic(_ridge(fitted, start, r), held), r) for r in _RIDGES]
    ridge = min(errors)[1]
    everything = _Moments(fitted.own + held.own, fitted.cross + held.cross)
    mixer.o_proj.weight.copy_(_ridge(everything, start, ridge))


@dataclass(frozen=True)
class _Moments:
    """Sums over tokens: own o o^T (HD, HD), cross y o^T (D, HD), float64."""

    own: Tensor
    cross: Tensor


def _moments(
    mixer: MixerModule, inputs: list[Tensor], targets: list[Tensor], positions: Positions
) -> tuple[_Moments, _Moments]:
    """Of three parts in four of the sequences, and of the rest."""
    weight = mixer.o_proj.weight.double()
    own, cross = torch.zeros_like(weight.mT @ weight), torch.zeros_like(weight)
    parts = [(own, cross), (own.clone(), cross.clone())]
    number = 0
    for x, y in zip(inputs, targets, strict=True):
        heads, _ = mixer.heads_output(x, positions, None, None)
        if mixer.o_proj.bias is not None:
            y = y - mixer.o_proj.bias
        for o, target in zip(heads.flatten(-2), y, strict=True):
            o, target = o[_FIRST:].double(), target[_FIRST:].double()
            own, cross = parts[number % 4 == 1]
            own += o.mT @ o
            cross += target.mT @ o
            number += 1
    return _Moments(*parts[0]), _Moments(*parts[1])


def _ridge(moments: _Moments, start: Tensor, ridge: float) -> Tensor:
    """The W nearest to both; ``ridge`` is relative to the mean square of o."""
    eye = torch.eye(len(moments.own), dtype=torch.float64, device=start.device)
    penalty = ridge * moments.own.diagonal().mean().clamp(min=1e-30)
    left, right = moments.own + penalty * eye, moments.cross + penalty * start
    return torch.linalg.solve(left, right.mT).mT


def _quadratic(weight: Tensor, held: _Moments) -> float:
    """|W o - y|^2 over the held-out tokens, less what does not depend on W."""
    return float(((weight @ held.own - 2 * held.cross) * weight).sum())
