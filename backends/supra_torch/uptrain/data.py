"""Text to training sequences: tokenised once, then a pure function of seed and step.

A mixture takes its sequences from several texts in turn, each in its own share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from supra_core.errors import SupraError
from supra_core.formats.atomic import atomic_file
from supra_core.formats.jsonfile import read_object
from supra_core.progress import Progress
from supra_torch.uptrain.config import DataPart

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tokens = npt.NDArray[np.uint32]

# Characters tokenised at once; pieces end where a line ends.
_PIECE = 200_000
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
        return self._row(self._order(epoch, trained)[index])

    def held_out(self) -> npt.NDArray[np.int64]:
        """The sequences that are never trained on, (held_out_count, length)."""
        return np.stack([self._row(i) for i in range(self.count - self.held_out_count, self.count)])

    def _order(self, epoch: int, trained: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(trained)

    def _row(self, index: int) -> npt.NDArray[np.int64]:
        return self.tokens[index * self.length : (index + 1) * self.length].astype(np.int64)


@dataclass(frozen=True)
class Mixture:
    """Several texts, of whose sequences each gives its share; shares add up to 1."""

    parts: tuple[Sequences, ...]
    shares: tuple[float, ...]

    @property
    def length(self) -> int:
        """Tokens in a sequence, of every part alike."""
        return self.parts[0].length

    def batch(self, seen: int, size: int, cut: int = 1) -> npt.NDArray[np.int64]:
        """The rows after ``seen`` tokens, (size, length / cut).

        Every sequence is cut into ``cut`` rows; ``seen`` is rounded up to whole rows.
        """
        row_length = self.length // cut
        first = -(-seen // row_length)
        rows = []
        for place in range(first, first + size):
            number, piece = divmod(place, cut)
            part, index = self.source(number)
            sequence = self.parts[part].sequence(index)
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


def all_tokens(
    parts: Sequence[DataPart],
    tokenizer: Tokenizer,
    separator: int | None,
    folder: Path,
    progress: Progress,
    *,
    begun: bool = True,
) -> list[Tokens]:
    """:func:`tokenised` for every part; several have a numbered folder each."""
    folders = [folder] if len(parts) == 1 else [folder / str(i) for i in range(len(parts))]
    return [
        tokenised(Path(part.path), tokenizer, separator, own, progress, begun=begun)
        for part, own in zip(parts, folders, strict=True)
    ]


def tokenised(
    path: Path,
    tokenizer: Tokenizer,
    separator: int | None,
    folder: Path,
    progress: Progress,
    *,
    begun: bool = True,
) -> Tokens:
    """The tokens of a text file or a folder of .txt files, kept as ``folder``/tokens.npy.

    ``separator``: the token between files. Raises SupraError when there is no text, or, in a run
    that has ``begun`` to train, the data has changed since.
    """
    files = text_files(path)
    listing = {"files": [[file.name, file.stat().st_size] for file in files]}
    store, note = folder / "tokens.npy", folder / "tokens.json"
    if store.exists() and note.exists():
        if read_object(note) == listing:
            return np.load(store, mmap_mode="r")  # type: ignore[no-any-return]
        if begun:
            raise SupraError(
                f"{path} is not the data this run began with: use another run folder, or restore it"
            )
    tokens = _tokenise(files, tokenizer, separator, progress)
    if not len(tokens):
        raise SupraError(f"{path} is empty: name a file with text in it")
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(store) as beside, open(beside, "wb") as stream:
        np.save(stream, tokens)
    with atomic_file(note) as beside:
        beside.write_text(json.dumps(listing), encoding="utf-8")
    return tokens


def text_files(path: Path) -> list[Path]:
    """The text file itself, or the .txt files of a folder in order of name."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix == ".txt" and file.is_file())
        if not files:
            raise SupraError(f"{path} holds no .txt file: name a text file or a folder of them")
        return files
    if not path.is_file():
        raise SupraError(f"{path} does not exist: name a text file or a folder of .txt files")
    return [path]


def _tokenise(
    files: list[Path], tokenizer: Tokenizer, separator: int | None, progress: Progress
) -> Tokens:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    total, done, parts = sum(file.stat().st_size for file in files), 0, []
    for file in files:
        # A batch is encoded on all cores.
        for pieces in _batches(_pieces(file), 16):
            for encoded in tokenizer.encode_batch(pieces, add_special_tokens=False):
                parts.append(np.asarray(encoded.ids, dtype=np.uint32))
            done += sum(len(piece.encode("utf-8")) for piece in pieces)
            progress("tokenise", done, total)
        if separator is not None:
            parts.append(np.asarray([separator], dtype=np.uint32))
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)


def _batches(pieces: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(islice(pieces, size)):
        yield batch


def _pieces(file: Path) -> Iterator[str]:
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise SupraError(f"{file} cannot be read ({error.strerror}): name a text file") from None
    except UnicodeDecodeError as error:
        raise SupraError(f"{file} is not UTF-8 text (byte {error.start}): convert it") from None
    start = 0
    while start < len(text):
        end = text.find("\n", min(start + _PIECE, len(text)))
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end
