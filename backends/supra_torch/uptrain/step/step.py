"""One optimiser step, whatever the model: what a run does, and what the benchmark times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supra_torch.recipes.config import Stage


def adamw(
    trained: Iterable[tuple[nn.Parameter, float, float]], stage: Stage, *, fused: bool = True
) -> torch.optim.AdamW:
    """AdamW over parameters, each with its peak learning rate and weight decay.

    The fused one rounds the last elements of a tensor, or of a shard, otherwise than the others;
    the one that is not goes parameter by parameter, since torch groups only what is not sharded.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter, peak, weight_decay in trained:
        groups.setdefault((peak, weight_decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "peak": peak, "weight_decay": weight_decay}
            for (peak, weight_decay), parameters in groups.items()
        ],
        lr=0.0,
        betas=(stage.beta1, stage.beta2),
        fused=fused,
        foreach=None if fused else False,
    )


def trained_parameters(optimiser: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """Every parameter an optimiser changes."""
    for group in optimiser.param_groups:
        yield from group["params"]


Clip = Callable[[Sequence[nn.Parameter], float], float]
"""Scales gradients to a norm of at most so much; returns the norm that they had."""


def clip_by_norm(parameters: Sequence[nn.Parameter], most: float) -> float:
    """A :data:`Clip` by torch's own means."""
    total = nn.utils.clip_grad_norm_(parameters, most)
    return (total.full_tensor() if isinstance(total, DTensor) else total).item()


class StepResult(NamedTuple):
    """A step's loss and gradient norm, and whether the weights were moved."""

    loss: float
    norm: float
    taken: bool


def training_step(
    accumulate: Callable[[], Tensor],
    optimiser: torch.optim.Optimizer,
    *,
    learning_rate_factor: float,
    clip: float,
    mean: Callable[[float], float] = lambda loss: loss,
    most: float = math.inf,
    clip_gradients: Clip = clip_by_norm,
) -> StepResult:
    """Gradients by ``accumulate``, which returns the loss; clip; optimiser.

    ``mean``: of the losses of all processes that share the step. No weight moves when loss or
    gradient norm is not finite, or the norm is above ``most``.
    """
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * learning_rate_factor
    loss = mean(accumulate().item())
    norm = clip_gradients(list(trained_parameters(optimiser)), clip)
    taken = math.isfinite(loss) and math.isfinite(norm) and norm <= most
    if taken:
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return StepResult(loss, norm, taken)


def learning_rate_factor(step: int, steps: int, warmup: float, final: float) -> float:
    """Linear warmup over a share of the steps, then a cosine to ``final``; 0 <= step < steps."""
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - warm)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))
