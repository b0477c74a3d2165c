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

from supra_core.data.documents import source_files
from supra_core.data.prepare import Settings, in_short, listing, prepare
from supra_core.data.store import TokenStore, tokenizer_hash
from supra_core.errors import FormatError, SupraError
from supra_core.families import needs_bos
from supra_core.formats.atomic import atomic_file
from supra_core.formats.jsonfile import INDEX_BYTES, read_object
from supra_core.model.spec import ModelSpec
from supra_core.progress import Progress
from supra_core.text import TOKENIZER
from supra_torch.recipes.config import DataPart

Tokens = TokenStore | npt.NDArray[Any]

# Where a run keeps the tokens of a text that was not prepared before.
_TOKENS = "tokens"

# Sequences set aside for evaluation, never trained on: one in 50, at most this many.
_HELD_OUT = 16


@dataclass(frozen=True)
class Rows:
    """Rows of tokens, and where documents begin in them: both (N, T), ids int64, begins bool.

    A row always begins a document. If the document began before the row, ``lead`` replaces its
    first token: some models need it.
    """

    ids: npt.NDArray[np.int64]
    begins: npt.NDArray[np.bool_]
    lead: int | None = None

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.ids[rows], self.begins[rows], self.lead)

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, pieces: int) -> Rows:
        """Every row cut into ``pieces``: (N pieces, T / pieces)."""
        length = self.ids.shape[1] // pieces
        return self.led(self.ids.reshape(-1, length), self.begins.reshape(-1, length), self.lead)

    @staticmethod
    def led(ids: npt.NDArray[np.int64], begins: npt.NDArray[np.bool_], lead: int | None) -> Rows:
        """Rows that may begin inside a document."""
        if lead is not None:
            ids = ids.copy()
            ids[~begins[:, 0], 0] = lead
        begins = begins.copy()
        begins[:, 0] = True
        return Rows(ids, begins, lead)

    @property
    def targets(self) -> int:
        """Tokens that follow another of their document."""
        return self.begins.size - int(self.begins.sum())

    def cu_seqlens(self, documents: int) -> npt.NDArray[np.int32]:
        """Where each document begins among all N T tokens, row by row, then their number.

        (documents + 1,); documents beyond those in these rows are empty.
        """
        starts = np.flatnonzero(self.begins)
        borders = np.full(documents + 1, self.begins.size, dtype=np.int32)
        borders[: len(starts)] = starts
        return borders


def joined(rows: Sequence[Rows]) -> Rows:
    """Rows of one length, one after the other."""
    ids, begins = (np.concatenate([getattr(r, name) for r in rows]) for name in ("ids", "begins"))
    return Rows(ids, begins, rows[0].lead)


@dataclass(frozen=True)
class Sequences:
    """Non-overlapping sequences of ``length`` tokens; the last few are held out.

    ``name`` stands for the text in errors. ``apart``: rows say where documents begin in them;
    else, and where the text is not stored in documents, each row is one. ``lead``: see
    :class:`Rows`.
    """

    tokens: Tokens
    length: int
    seed: int
    name: str = "the data"
    apart: bool = True
    lead: int | None = None

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
        """Tokens of an epoch, without held-out ones, in whole sequences."""
        return (self.count - self.held_out_count) * self.length

    def sequence(self, number: int) -> Rows:
        """The ``number``-th sequence of the run, a row: once an epoch each, shuffled anew."""
        trained = self.count - self.held_out_count
        epoch, index = divmod(number, trained)
        return self._row(int(_order(self.seed, epoch, trained)[index]))

    def held_out(self) -> Rows:
        """The sequences that are never trained on, held_out_count rows."""
        return joined([self._row(i) for i in range(self.count - self.held_out_count, self.count)])

    def most_documents(self, cut: int) -> int:
        """The most documents in any row, where every sequence is cut into ``cut`` of them."""
        if not self.apart or not isinstance(self.tokens, TokenStore):
            return 1
        return _most_documents(self.tokens, self.length // cut)

    def _row(self, index: int) -> Rows:
        start, stop = index * self.length, (index + 1) * self.length
        begins = np.zeros((1, self.length), dtype=bool)
        if self.apart and isinstance(self.tokens, TokenStore):
            begins[0, self.tokens.documents(start, stop) - start] = True
        return Rows.led(self.tokens[start:stop].astype(np.int64)[None], begins, self.lead)


@lru_cache(maxsize=8)
def _most_documents(tokens: TokenStore, length: int) -> int:
    """The store's, computed once per length."""
    return tokens.most_documents(length)


@lru_cache(maxsize=8)
def _order(seed: int, epoch: int, trained: int) -> npt.NDArray[np.int64]:
    """The order of sequences in an epoch; cached, since every row of a step asks for it."""
    return np.random.default_rng([seed, epoch]).permutation(trained)


@dataclass(frozen=True)
class Mixture:
    """Several texts, each with its share of the sequences; shares add up to 1."""

    parts: tuple[Sequences, ...]
    shares: tuple[float, ...]

    @property
    def length(self) -> int:
        """Tokens in a sequence, the same in every part."""
        return self.parts[0].length

    def batch(self, seen: int, size: int, cut: int = 1, part: slice = slice(None)) -> Rows:
        """The ``size`` rows of length / cut after ``seen`` tokens, or ``part`` of them.

        Every sequence is cut into ``cut`` rows; ``seen`` is rounded up to whole rows.
        """
        row_length = self.length // cut
        first = -(-seen // row_length)
        rows = []
        for place in range(first, first + size)[part]:
            number, piece = divmod(place, cut)
            text, index = self.source(number)
            sequence = self.parts[text].sequence(index)
            rows.append(sequence.cut(cut)[piece : piece + 1])
        return joined(rows)

    def most_documents(self, cut: int) -> int:
        """The most documents in any row of a sequence that is cut into ``cut`` rows."""
        return max(part.most_documents(cut) for part in self.parts)

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

    def held_out(self) -> Rows:
        """Sequences that are never trained on, of each part by its share."""
        kept = []
        for part, share in zip(self.parts, self.shares, strict=True):
            rows = part.held_out()
            kept.append(rows[-max(1, round(share * len(rows))) :])
        return joined(kept)


def mixture(
    parts: Sequence[DataPart],
    tokens: Sequence[Tokens],
    length: int,
    seed: int,
    apart: bool = True,
    lead: int | None = None,
) -> Mixture:
    """The texts as one source; those without a share divide the rest by size."""
    sequences = tuple(
        Sequences(found, length, seed, part.path, apart, lead)
        for found, part in zip(tokens, parts, strict=True)
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
                f"read them {times:.2g} times: give more text or fewer tokens, or set "
                f"epochs={math.ceil(times)}"
            )


@dataclass(frozen=True)
class Texts:
    """The texts of a run and the model that tokenises them.

    ``folder``: for the tokens of texts that were not prepared before; several parts have a
    numbered folder each.
    """

    parts: Sequence[DataPart]
    assets: Mapping[str, bytes]
    spec: ModelSpec
    folder: Path

    def refuse_unfit(self) -> None:
        """Raise SupraError when a part cannot be read, or was prepared with another tokenizer."""
        for part in self.parts:
            if not TokenStore.is_at(Path(part.path)):
                source_files(part.path)
            elif TokenStore(Path(part.path)).tokenizer_hash != tokenizer_hash(
                self.assets[TOKENIZER]
            ):
                raise SupraError(
                    f"{part.path} was prepared with another tokenizer than the model's: prepare "
                    "the text again with supra data prepare --tokenizer MODEL"
                )

    def stores(self, progress: Progress, *, begun: bool, check: bool) -> list[TokenStore]:
        """The tokens of every part, prepared now if they were not before.

        Raises SupraError when there is no text or, in a run that has ``begun`` to train, the data
        has changed. ``check``: compare all tokens with their checksums, as one process does for
        all.
        """
        found = []
        for number, part in enumerate(self.parts):
            folder = self.folder if len(self.parts) == 1 else self.folder / str(number)
            found.append(self._store(part.path, folder, progress, begun))
        for store in found if check else ():
            if store.folder.is_relative_to(self.folder):
                store.check("restore it, or use another run folder")
            else:
                store.check()
        return found

    def _store(self, path: str, folder: Path, progress: Progress, begun: bool) -> TokenStore:
        separator = next(iter(self.spec.eos_token_id or ()), None)
        settings = Settings(
            (path,), separator, self.spec.vocab_size, needs_bos=needs_bos(self.spec)
        )
        prepared = TokenStore(Path(path)) if TokenStore.is_at(Path(path)) else None
        note = folder / "data.json"
        stated = (
            {"files": listing(settings.sources)} if prepared is None else {"name": prepared.name}
        )
        kept = prepared is not None or TokenStore.is_at(folder / _TOKENS)
        whole = kept and note.is_file()
        if whole and _noted(note) == stated:
            return prepared or TokenStore(folder / _TOKENS)
        if begun and not whole:
            raise SupraError(
                f"{folder}, where the run keeps the tokens of {path}, is incomplete: restore it, "
                "or use another run folder"
            )
        if begun:
            raise SupraError(
                f"{path} is not the data this run began with: use another run folder, or restore it"
            )
        found = prepared or prepare(
            settings, self.assets, folder / _TOKENS, where="the model", force=True,
            progress=progress,
        )  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(note) as beside:
            beside.write_text(json.dumps(stated), encoding="utf-8")
        return found


def _noted(note: Path) -> dict[str, Any]:
    """A run's record of its data; older versions listed every file."""
    known = read_object(note, INDEX_BYTES)
    if "files" not in known:
        return known
    try:
        return known | {"files": in_short(known["files"])}
    except (TypeError, ValueError):
        raise FormatError(
            f"{note}: field files is not a list of files: restore it, or use another run folder"
        ) from None
