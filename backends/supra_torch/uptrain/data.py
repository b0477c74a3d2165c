"""Text to training sequences: tokenised once, then a pure function of seed and step.

A mixture takes its sequences from several texts in turn, each in its own share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from supra_core.corpus.documents import source_files
from supra_core.corpus.prepare import Settings, listing, prepare
from supra_core.corpus.store import TokenStore, tokenizer_hash
from supra_core.errors import SupraError
from supra_core.formats.atomic import atomic_file
from supra_core.formats.jsonfile import read_object
from supra_core.progress import Progress
from supra_core.spec import ModelSpec
from supra_core.text import TOKENIZER
from supra_torch.uptrain.config import DataPart

Tokens = TokenStore | npt.NDArray[Any]

# Where a run keeps the tokens of a text that was not prepared before.
_TOKENS = "tokens"

# Sequences set aside for evaluation, never trained on: one in 50, at most this many.
_HELD_OUT = 16


@dataclass(frozen=True)
class Sequences:
    """Non-overlapping sequences of ``length`` tokens; the last few are held out.

    ``name`` stands for the text in errors.
    """

    tokens: Tokens
    length: int
    seed: int
    name: str = "the data"

    def __post_init__(self) -> None:
        if self.count < 2:
            raise SupraError(
                f"{self.name} has {len(self.tokens):,} tokens, too few for two sequences of "
                f"{self.length}: give more text or a smaller sequence_length"
            )

    @property
    def count(self) -> int:
        """Sequences, held-out ones included."""
        return len(self.tokens) // self.length

    @property
    def held_out_count(self) -> int:
        return min(_HELD_OUT, max(1, self.count // 50))

    @property
    def trained_tokens(self) -> int:
        """Tokens of an epoch: what is not held out, in whole sequences."""
        return (self.count - self.held_out_count) * self.length

    def sequence(self, number: int) -> npt.NDArray[np.int64]:
        """The ``number``-th sequence of the run, (length,): once an epoch each, shuffled anew."""
        trained = self.count - self.held_out_count
        epoch, index = divmod(number, trained)
        return self._row(_order(self.seed, epoch, trained)[index])

    def held_out(self) -> npt.NDArray[np.int64]:
        """The sequences that are never trained on, (held_out_count, length)."""
        return np.stack([self._row(i) for i in range(self.count - self.held_out_count, self.count)])

    def _row(self, index: int) -> npt.NDArray[np.int64]:
        return self.tokens[index * self.length : (index + 1) * self.length].astype(np.int64)


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, trained: int) -> npt.NDArray[np.int64]:
    """Which sequence comes when in an epoch; kept, since every row of a step asks for it."""
    return np.random.default_rng([seed, epoch]).permutation(trained)


@dataclass(frozen=True)
class Mixture:
    """Several texts, of whose sequences each gives its share; shares add up to 1."""

    parts: tuple[Sequences, ...]
    shares: tuple[float, ...]

    @property
    def length(self) -> int:
        """Tokens in a sequence, of every part alike."""
        return self.parts[0].length

    def batch(
        self, seen: int, size: int, cut: int = 1, part: slice = slice(None)
    ) -> npt.NDArray[np.int64]:
        """The rows after ``seen`` tokens, (size, length / cut), or ``part`` of them.

        Every sequence is cut into ``cut`` rows; ``seen`` is rounded up to whole rows.
        """
        row_length = self.length // cut
        first = -(-seen // row_length)
        rows = []
        for place in range(first, first + size)[part]:
            number, piece = divmod(place, cut)
            text, index = self.source(number)
            sequence = self.parts[text].sequence(index)
            rows.append(sequence[piece * row_length : (piece + 1) * row_length])
        return np.stack(rows)

    def source(self, number: int) -> tuple[int, int]:
        """Which part the ``number``-th sequence comes from, and which of its sequences it is.

        Part by part against all later ones: of every n sequences the part has floor(n share).
        """
        left = 1.0
        for part, share in enumerate(self.shares[:-1]):
            own = share / left
            before, after = math.floor(number * own), math.floor((number + 1) * own)
            if after > before:
                return part, before
            number, left = number - before, left - share
        return len(self.shares) - 1, number

    def held_out(self) -> npt.NDArray[np.int64]:
        """Sequences that are never trained on, (N, length), of each part by its share."""
        kept = []
        for part, share in zip(self.parts, self.shares, strict=True):
            rows = part.held_out()
            kept.append(rows[-max(1, round(share * len(rows))) :])
        return np.concatenate(kept)


def mixture(parts: Sequence[DataPart], tokens: Sequence[Tokens], length: int, seed: int) -> Mixture:
    """The texts as one source; what has no share divides the rest by size."""
    sequences = tuple(
        Sequences(found, length, seed, part.path) for found, part in zip(tokens, parts, strict=True)
    )
    stated = sum(part.share or 0.0 for part in parts)
    others = sum(s.trained_tokens for s, p in zip(sequences, parts, strict=True) if not p.share)
    # Shares that do not add up to 1, because all are stated, are proportions.
    whole = 1.0 if others else stated
    shares = tuple(
        part.share / whole if part.share else (1 - stated) * own.trained_tokens / others
        for part, own in zip(parts, sequences, strict=True)
    )
    return Mixture(sequences, shares)


def refuse_too_little(data: Mixture, parts: Sequence[DataPart], tokens: int, epochs: float) -> None:
    """Raise SupraError when a run of ``tokens`` reads a text more than ``epochs`` times."""
    for part, own, share in zip(parts, data.parts, data.shares, strict=True):
        times = tokens * share / own.trained_tokens
        if times > epochs:
            raise SupraError(
                f"{part.path} has {own.trained_tokens:,} tokens to train on, and the run would "
                f"read them {times:.1f} times: give more text or fewer tokens, or set "
                f"epochs={math.ceil(times)}"
            )


def refuse_unfit(parts: Sequence[DataPart], assets: Mapping[str, bytes]) -> None:
    """Raise SupraError when a part cannot be read, or was prepared with another tokenizer."""
    for part in parts:
        if not TokenStore.is_at(Path(part.path)):
            source_files(part.path)
        elif TokenStore(Path(part.path)).tokenizer_hash != tokenizer_hash(assets[TOKENIZER]):
            raise SupraError(
                f"{part.path} was prepared with another tokenizer than the model's: prepare the "
                "text again with supra data prepare --tokenizer MODEL"
            )


def stored(
    parts: Sequence[DataPart],
    assets: Mapping[str, bytes],
    spec: ModelSpec,
    folder: Path,
    progress: Progress,
    *,
    begun: bool = True,
) -> list[TokenStore]:
    """The tokens of every part: those of a prepared text, or of any other, prepared in ``folder``.

    Several parts have a numbered folder each. Raises SupraError when there is no text or, in a
    run that has ``begun`` to train, the data has changed.
    """
    folders = [folder] if len(parts) == 1 else [folder / str(i) for i in range(len(parts))]
    return [
        _stored(part.path, assets, spec, own, progress, begun)
        for part, own in zip(parts, folders, strict=True)
    ]


def _stored(
    path: str,
    assets: Mapping[str, bytes],
    spec: ModelSpec,
    folder: Path,
    progress: Progress,
    begun: bool,
) -> TokenStore:
    ends = spec.eos_token_id
    settings = Settings((path,), ends[0] if ends else None, spec.vocab_size)
    prepared = TokenStore(Path(path)) if TokenStore.is_at(Path(path)) else None
    note = folder / "data.json"
    stated = {"files": listing(settings.sources)} if prepared is None else {"name": prepared.name}
    if note.is_file() and read_object(note) == stated:
        return prepared or TokenStore(folder / _TOKENS)
    if begun:
        raise SupraError(
            f"{path} is not the data this run began with: use another run folder, or restore it"
        )
    found = prepared or prepare(
        settings, assets, folder / _TOKENS, where="the model", force=True, progress=progress
    )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(note) as beside:
        beside.write_text(json.dumps(stated), encoding="utf-8")
    return found
