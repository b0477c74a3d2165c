"""What a model says of each token of a sequence: its loss, and whether it is the likeliest."""

from __future__ import annotations

from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from supra_core.runtime.backend import Backend, Form, Ids, Logits

# What models that are compared compute in: a type as stored would count as part of the conversion.
DTYPE = "float32"

Losses = npt.NDArray[np.float32]
Greedy = npt.NDArray[np.bool_]


class TokenScores(Protocol):
    """What a backend may offer besides the protocol: scores without keeping the logits."""

    def token_scores(self, ids: Ids, *, form: Form = "parallel") -> tuple[Losses, Greedy]:
        """-log p of ids[:, 1:] in nats and whether each is the likeliest, both (B, T - 1)."""
        ...


def token_scores(model: Backend, ids: Ids, form: Form = "parallel") -> tuple[Losses, Greedy]:
    """-log p of each token after the first in nats, and whether it is the likeliest.

    ids (B, T) -> two arrays (B, T - 1).
    """
    if hasattr(model, "token_scores"):
        return cast(TokenScores, model).token_scores(ids, form=form)
    logits = model.logits(ids, form=form)
    return losses_of(logits, ids), logits[:, :-1].argmax(axis=-1) == ids[:, 1:]


def losses_of(logits: Logits, ids: Ids) -> Losses:
    """Cross entropy in nats of ids[:, 1:] (B, T - 1) under logits (B, T, V)."""
    predicted: npt.NDArray[Any] = logits[:, :-1]
    top = predicted.max(axis=-1, keepdims=True)
    log_sum = np.log(np.exp(predicted - top).sum(axis=-1)) + top[..., 0]
    chosen = np.take_along_axis(predicted, ids[:, 1:, None], axis=-1)[..., 0]
    return np.asarray(log_sum - chosen, dtype=np.float32)
