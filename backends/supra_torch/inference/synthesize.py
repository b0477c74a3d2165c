"""Sampling training text from a model, many rows in step."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from supra_core.data.synthesis.rows import (
    ConversationRow,
    DocumentRow,
    Kind,
    Row,
    Sample,
    Script,
    Vocabulary,
)
from supra_core.text.chat_template import ChatTurns
from supra_torch.inference.lockstep import LockstepDecoder
from supra_torch.model.model import SupraModel

# The nucleus is looked for among this many likeliest tokens; what is beyond is never sampled.
NUCLEUS_CANDIDATES = 2048
# Ended rows are computed along until they are this share of all; then the others move up.
_ENDED_SHARE = 8

Uniforms = npt.NDArray[np.float64]
Watch = Callable[[int], None]


@dataclass(frozen=True)
class Draw:
    """How a token is drawn, and which batch: the numbers that randomness depends on."""

    temperature: float
    top_p: float
    seed: int

    def uniforms(self, batch: int, row: int, length: int) -> Uniforms:
        """The numbers in [0, 1) that decide a row's tokens, one a position, (length,)."""
        return np.random.default_rng([self.seed, batch, row]).random(length)


class Synthesizer:
    """Batches of samples from ``model``, each a function of draw, kind, number and size alone.

    ``length``: tokens of a sample at most, the template's included. ``turns``: the template's
    strings, None for a model without; ``most_turns`` of a user in a conversation. Row r of a batch
    has random numbers of its own; its text does not depend on the other rows but for rounding.
    """

    def __init__(
        self,
        model: SupraModel,
        words: Vocabulary,
        draw: Draw,
        *,
        length: int,
        turns: ChatTurns | None,
        most_turns: int,
    ) -> None:
        self.model, self.words, self.draw, self.length = model, words, draw, length
        self.device = model.model.embed_tokens.weight.device
        self._script = None if turns is None else Script(words, turns, most_turns)

    @torch.inference_mode()
    def batch(self, number: int, kind: Kind, rows: int, watch: Watch | None = None) -> list[Sample]:
        """The samples of one batch in order of row.

        ``watch`` is told at each step how many rows went on by a token.
        """
        prefix, stops = self._prefix(kind)
        under_way = [self._row(kind) for _ in range(rows)]
        uniforms = np.stack([self.draw.uniforms(number, row, self.length) for row in range(rows)])
        decoder = LockstepDecoder(
            self.model, torch.tensor(prefix, device=self.device), rows, self.length
        )
        forbidden = self._forbidden(stops)
        places = np.arange(rows)
        for position in range(len(prefix), self.length):
            drawn = draw_tokens(
                decoder.logits + forbidden, uniforms[places, position], self.draw.temperature,
                self.draw.top_p,
            ).tolist()  # fmt: skip
            fed = [
                None if under_way[row].done else under_way[row].next(token)
                for row, token in zip(places, drawn, strict=True)
            ]
            alive = [place for place, token in enumerate(fed) if token is not None]
            if watch is not None:
                watch(len(alive))
            if not alive or position + 1 == self.length:
                break
            if _ENDED_SHARE * (len(fed) - len(alive)) >= len(fed):
                decoder.keep(torch.tensor(alive, device=self.device))
                places, fed = places[alive], [fed[place] for place in alive]
            decoder.step(torch.tensor([token or 0 for token in fed], device=self.device))
        return [row.sample() for row in under_way]

    def _prefix(self, kind: Kind) -> tuple[list[int], Collection[int]]:
        """What all rows of a kind begin with, and the tokens that end something in them."""
        if kind == "document":
            return [self.words.start], self.words.ends
        assert self._script is not None
        return self.words.encode(self._script.opening), self._script.stops

    def _row(self, kind: Kind) -> Row:
        if kind == "document":
            return DocumentRow(self.words)
        assert self._script is not None
        return ConversationRow(self._script)

    def _forbidden(self, stops: Collection[int]) -> Tensor:
        """(V,): -inf where a token is special and ends nothing, or is no token at all, else 0."""
        size = self.model.spec.vocab_size
        barred = torch.zeros(size, device=self.device)
        barred[
            [ident for ident in self.words.special if ident not in stops and ident < size]
        ] = -torch.inf
        barred[self.words.size :] = -torch.inf
        return barred


def draw_tokens(logits: Tensor, uniforms: Uniforms, temperature: float, top_p: float) -> Tensor:
    """A token for each row of logits (n, V), (n,), where uniforms (n,) decide.

    ``top_p`` < 1 keeps the likeliest tokens that together have that probability, the one that
    reaches it included; if NUCLEUS_CANDIDATES have less, those. ``top_p`` 1 draws from all.
    """
    scaled = logits.float() / temperature
    chance = torch.from_numpy(uniforms).to(logits.device)[:, None]
    if top_p >= 1:
        return _inverse(scaled.softmax(-1).double(), chance)
    likeliest, order = _likeliest(scaled, min(NUCLEUS_CANDIDATES, scaled.shape[1]))
    probabilities = (likeliest - scaled.logsumexp(-1, keepdim=True)).double().exp()
    before = probabilities.cumsum(-1) - probabilities
    drawn = _inverse(probabilities * (before < top_p), chance)
    return order.gather(1, drawn[:, None])[:, 0]


def _likeliest(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of logits (n, V) in descending order, and where they stand."""
    if logits.device.type != "cpu":
        return logits.topk(count)
    # NumPy's selection takes half of torch's time.
    array = logits.numpy()
    chosen = np.argpartition(array, -count, axis=1)[:, -count:]
    values = torch.from_numpy(np.take_along_axis(array, chosen, axis=1))
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, torch.from_numpy(chosen).gather(1, order)


def _inverse(weights: Tensor, chance: Tensor) -> Tensor:
    """The place (n,) at which the sum of weights (n, m) passes the share ``chance`` (n, 1)."""
    sums = weights.cumsum(-1)
    found = torch.searchsorted(sums, chance * sums[:, -1:], right=True)[:, 0]
    # Rounding may put the sum a hair below the total.
    last = (weights > 0).long().cumsum(-1).argmax(-1)
    return torch.minimum(found, last)
