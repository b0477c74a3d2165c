"""Losses over a vocabulary, without holding the logits of all tokens.

For each chunk of tokens the gradient by the logits is turned into the gradients of the hidden
states and the head at once, as in Liger-Kernel's and cut-cross-entropy's fused losses; so peak
memory is a chunk's logits, and nothing is computed twice. Ours, since those two are Triton alone
and the logits are the largest memory on a CPU too, and since torch's own
``F.linear_cross_entropy`` trades that memory for several times the time. On a GPU what happens
between the products is one function for torch.compile, which passes over the logits thrice
instead of a dozen times.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from supra_torch.ops.target import kind

IGNORED = -100
# Tokens whose logits stay in a CPU's reach; logits that fill a GPU: 512 MiB in float32.
_CPU_CHUNK = 512
_GPU_LOGITS = 2**27


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int | None = None,
    divisor: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Mean over tokens of -log softmax(hidden weight^T)[target], in nats.

    hidden (tokens, D); weight (V, D); targets (tokens,) int64, where -100 marks a token that does
    not count. ``divisor``: what the sum is divided by, instead of the tokens that count. Products
    are taken in the type of ``hidden``, everything else is float32 (float64 for float64).
    ``chunk``: tokens whose logits are held at once (None: as many as suit the device).
    ``softcap``: a logit x becomes cap tanh(x / cap) first. NaN when no
    token counts and there is no divisor, as torch's own. Raises ValueError when the shapes do not
    fit together.
    """
    chunk = chunk or _chunk(hidden, weight)
    _check(hidden, weight, chunk)
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must have shape ({len(hidden)},), not {tuple(targets.shape)}")
    loss, *_ = torch.ops.supra.linear_cross_entropy(
        hidden, weight, targets, divisor, chunk, softcap, _needed(hidden), _needed(weight)
    )
    return loss


def linear_kl_divergence(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    chunk: int | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """Mean over tokens of KL(teacher || student), in nats.

    hidden (tokens, D) and weight (V, D) are the student's, the others the teacher's, whose D may
    differ; types, ``chunk`` and softcaps as in :func:`linear_cross_entropy`. Gradients reach
    ``hidden`` and ``weight`` only. Raises ValueError when the shapes do not fit together.
    """
    chunk = chunk or _chunk(hidden, weight)
    _check(hidden, weight, chunk)
    _check(teacher_hidden, teacher_weight, chunk)
    if len(hidden) != len(teacher_hidden) or len(weight) != len(teacher_weight):
        raise ValueError(
            f"the student's {len(hidden)} tokens over {len(weight)} words do not fit the "
            f"teacher's {len(teacher_hidden)} over {len(teacher_weight)}"
        )
    loss, *_ = torch.ops.supra.linear_kl_divergence(
        hidden, weight, teacher_hidden, teacher_weight, chunk, softcap, teacher_softcap,
        _needed(hidden), _needed(weight),
    )  # fmt: skip
    return loss


def _chunk(hidden: Tensor, weight: Tensor) -> int:
    """Tokens whose logits are held at once; as many in every chunk, where that can be."""
    if kind(hidden) == "cpu":
        return _CPU_CHUNK
    needed = -(-max(1, len(hidden)) * len(weight) // _GPU_LOGITS)
    chunks = 1 << (needed - 1).bit_length()
    return -(-max(1, len(hidden)) // chunks)


def _check(hidden: Tensor, weight: Tensor, chunk: int) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or chunk < 1:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and chunk {chunk} do not "
            "fit together: (tokens, D), (V, D) and at least 1"
        )


def _needed(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


# --- the operators: the loss, and the gradients of its sum over tokens ------------------------


@torch.library.custom_op("supra::linear_cross_entropy", mutates_args=())
def _cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, divisor: int | None, chunk: int,
    softcap: float | None, for_hidden: bool, for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    counted = targets != IGNORED
    # With zero hidden states an ignored token's share of the head's gradient is zero.
    hidden = hidden.masked_fill(~counted[:, None], 0.0)
    targets = targets.where(counted, 0)
    gradients = _Gradients(hidden, weight, for_hidden, for_weight)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for rows in _chunks(len(hidden), chunk):
        rowwise = gradients.rowwise(_cross_entropy_rows)
        loss, by_logits = rowwise(
            _logits(hidden[rows], gradients.head), targets[rows], counted[rows], softcap,
            gradients.wanted,
        )  # fmt: skip
        total += loss
        if by_logits is not None:
            gradients.add(rows, by_logits)
    gradients.hidden.masked_fill_(~counted[: len(gradients.hidden), None], 0.0)
    if divisor is None:
        count = counted.sum(dtype=torch.float64)
    else:
        count = torch.full_like(total, divisor)
    return (total / count).to(_sums(hidden)), gradients.hidden, gradients.weight, count


@torch.library.custom_op("supra::linear_kl_divergence", mutates_args=())
def _kl_divergence(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, chunk: int,
    softcap: float | None, teacher_softcap: float | None, for_hidden: bool, for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    gradients = _Gradients(hidden, weight, for_hidden, for_weight)
    teacher_hidden, teacher_head = (x.to(hidden.dtype) for x in (teacher_hidden, teacher_weight))
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for rows in _chunks(len(hidden), chunk):
        rowwise = gradients.rowwise(_kl_divergence_rows)
        loss, by_logits = rowwise(
            _logits(hidden[rows], gradients.head),
            _logits(teacher_hidden[rows], teacher_head),
            softcap,
            teacher_softcap,
            gradients.wanted,
        )
        total += loss
        if by_logits is not None:
            gradients.add(rows, by_logits)
    count = torch.full_like(total, len(hidden))
    return (total / count).to(_sums(hidden)), gradients.hidden, gradients.weight, count


def _cross_entropy_rows(
    logits: Tensor, targets: Tensor, counted: Tensor, softcap: float | None, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """The losses' sum, float64, and where ``wanted`` its gradient by the logits, in their type."""
    place = targets[:, None]
    capped, slope = _capped(logits, softcap)
    log_probability = torch.log_softmax(capped, dim=-1)
    losses = log_probability.gather(1, place).where(counted[:, None], 0.0)
    total = -losses.sum(dtype=torch.float64)
    if not wanted:
        return total, None
    minus_one = log_probability.new_full((1, 1), -1.0).expand(place.shape)
    gradient = log_probability.exp_().scatter_add_(1, place, minus_one)
    return total, (gradient if slope is None else gradient.mul_(slope)).to(logits.dtype)


def _kl_divergence_rows(
    logits: Tensor,
    teacher_logits: Tensor,
    softcap: float | None,
    teacher_softcap: float | None,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """As :func:`_cross_entropy_rows`."""
    capped, slope = _capped(logits, softcap)
    student = torch.log_softmax(capped, dim=-1)
    teacher = torch.log_softmax(_capped(teacher_logits, teacher_softcap)[0], dim=-1)
    probability = teacher.exp()
    total = teacher.sub_(student).mul_(probability).sum(-1).sum(dtype=torch.float64)
    if not wanted:
        return total, None
    gradient = student.exp_().sub_(probability)
    return total, (gradient if slope is None else gradient.mul_(slope)).to(logits.dtype)


def _capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """The logits in the type of sums, softcapped, and the cap's derivative: 1 - tanh(x / cap)^2."""
    exact = logits.to(_sums(logits))
    if softcap is None:
        return exact, None
    bent = torch.tanh(exact / softcap)
    return softcap * bent, 1.0 - bent * bent


Rows = Callable[..., tuple[Tensor, Tensor | None]]


@functools.cache
def _fused(function: Rows) -> Rows:
    compiled: Rows = torch.compile(function, dynamic=False)
    return compiled


class _Gradients:
    """The gradients of hidden states and head, gathered chunk by chunk; empty if not asked for."""

    def __init__(self, hidden: Tensor, weight: Tensor, for_hidden: bool, for_weight: bool) -> None:
        self.states, self.head = hidden, weight.to(hidden.dtype)
        self.hidden = torch.empty_like(hidden) if for_hidden else hidden.new_empty(0, 1)
        self.weight = weight.new_zeros(weight.shape if for_weight else (0, 1), dtype=_sums(hidden))
        self.for_hidden, self.for_weight = for_hidden, for_weight

    @property
    def wanted(self) -> bool:
        """Whether anything asks for a gradient."""
        return self.for_hidden or self.for_weight

    def rowwise(self, function: Rows) -> Rows:
        """``function``, compiled for a GPU that trains: evaluation has rows of many lengths."""
        compiles = self.wanted and self.head.is_cuda and importlib.util.find_spec("triton")
        return _fused(function) if compiles else function

    def add(self, rows: slice, by_logits: Tensor) -> None:
        """The share of a chunk, from the gradient by its logits (rows, V)."""
        with torch.autocast(by_logits.device.type, enabled=False):
            if self.for_hidden:
                torch.mm(by_logits, self.head, out=self.hidden[rows])
            if self.for_weight:
                self.weight += by_logits.T @ self.states[rows]


def _logits(hidden: Tensor, head: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return hidden @ head.T


def _sums(x: Tensor) -> torch.dtype:
    """The type of sums: float32, float64 for float64."""
    return torch.promote_types(x.dtype, torch.float32)


def _chunks(tokens: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, tokens)) for start in range(0, tokens, chunk)]


# --- what torch.compile and autograd have to know ---------------------------------------------


@_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, divisor: int | None, chunk: int,
    softcap: float | None, for_hidden: bool, for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _fake(hidden, weight, for_hidden, for_weight)


@_kl_divergence.register_fake
def _(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, chunk: int,
    softcap: float | None, teacher_softcap: float | None, for_hidden: bool, for_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _fake(hidden, weight, for_hidden, for_weight)


def _fake(
    hidden: Tensor, weight: Tensor, for_hidden: bool, for_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums = _sums(hidden)
    return (
        hidden.new_empty((), dtype=sums),
        torch.empty_like(hidden) if for_hidden else hidden.new_empty(0, 1),
        weight.new_empty(weight.shape if for_weight else (0, 1), dtype=sums),
        hidden.new_empty((), dtype=torch.float64),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:])
    ctx.needed, ctx.types = inputs[-2:], (inputs[0].dtype, inputs[1].dtype)
    ctx.others = len(inputs) - 2


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    """The saved gradients of the sum, times the loss's gradient over the tokens that count."""
    by_hidden, by_weight, count = ctx.saved_tensors
    found: list[Tensor | None] = [None, None]
    if grad is not None:
        for index, saved in enumerate((by_hidden, by_weight)):
            if ctx.needed[index]:
                factor = (grad / count).to(_sums(saved))
                found[index] = (saved * factor).to(ctx.types[index])
    return (*found, *(None for _ in range(ctx.others)))


_cross_entropy.register_autograd(_backward, setup_context=_save)
_kl_divergence.register_autograd(_backward, setup_context=_save)
