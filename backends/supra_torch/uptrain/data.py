"""Text to training sequences: tokenised once, then a pure function of seed and step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from supra_core.errors import SupraError
from supra_core.formats.atomic import atomic_file
from supra_core.progress import Progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Tokens = npt.NDArray[np.uint32]

# Characters tokenised at once; pieces end where a line ends.
_PIECE = 200_000
# Sequences set aside for evaluation, never trained on: one in 50, at most this many.
_HELD_OUT = 16


@dataclass(frozen=True)
class Sequences:
    """Non-overlapping sequences of ``length`` tokens; the last few are held out."""

    tokens: Tokens
    length: int
    seed: int

    def __post_init__(self) -> None:
        if self.count < 2:
            raise SupraError(
                f"the data has {len(self.tokens):,} tokens, too few for two sequences of "
                f"{self.length}: give more text or a smaller sequence_length"
            )

    @property
    def count(self) -> int:
        """Sequences, held-out ones included."""
        return len(self.tokens) // self.length

    @property
    def held_out_count(self) -> int:
        return min(_HELD_OUT, max(1, self.count // 50))

    def batch(self, seen: int, size: int, cut: int = 1) -> npt.NDArray[np.int64]:
        """The rows after ``seen`` tokens, (size, length / cut).

        Every sequence comes once an epoch, shuffled anew, cut into ``cut`` rows; ``seen`` is
        rounded up to whole rows.
        """
        trained, row_length = self.count - self.held_out_count, self.length // cut
        first = -(-seen // row_length)
        rows = []
        for place in range(first, first + size):
            number, part = divmod(place, cut)
            epoch, index = divmod(number, trained)
            sequence = self._row(self._order(epoch, trained)[index])
            rows.append(sequence[part * row_length : (part + 1) * row_length])
        return np.stack(rows)

    def held_out(self) -> npt.NDArray[np.int64]:
        """The sequences that are never trained on, (held_out_count, length)."""
        return np.stack([self._row(i) for i in range(self.count - self.held_out_count, self.count)])

    def _order(self, epoch: int, trained: int) -> npt.NDArray[np.int64]:
        return np.random.default_rng([self.seed, epoch]).permutation(trained)

    def _row(self, index: int) -> npt.NDArray[np.int64]:
        return self.tokens[index * self.length : (index + 1) * self.length].astype(np.int64)


def tokenised(
    path: Path, tokenizer: Tokenizer, separator: int | None, folder: Path, progress: Progress
) -> Tokens:
    """The tokens of a text file or a folder of .txt files, kept as ``folder``/tokens.npy.

    ``separator``: the token between files. Raises SupraError when there is no text, or the data
    has changed since.
    """
    files = text_files(path)
    listing = {"files": [[file.name, file.stat().st_size] for file in files]}
    store, note = folder / "tokens.npy", folder / "tokens.json"
    if store.exists() and note.exists():
        if json.loads(note.read_text("utf-8")) != listing:
            raise SupraError(
                f"{path} is not the data this run began with: use another run folder, or restore it"
            )
        return np.load(store, mmap_mode="r")  # type: ignore[no-any-return]
    tokens = _tokenise(files, tokenizer, separator, progress)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(store) as beside, open(beside, "wb") as stream:
        np.save(stream, tokens)
    with atomic_file(note) as beside:
        beside.write_text(json.dumps(listing), encoding="utf-8")
    return tokens


def text_files(path: Path) -> list[Path]:
    """The text file itself, or the .txt files of a folder in order of name."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix == ".txt")
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
    return np.concatenate(parts)


def _batches(pieces: Iterator[str], size: int) -> Iterator[list[str]]:
    while batch := list(islice(pieces, size)):
        yield batch


def _pieces(file: Path) -> Iterator[str]:
    try:
        text = file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise SupraError(f"{file} is not UTF-8 text (byte {error.start}): convert it") from None
    start = 0
    while start < len(text):
        end = text.find("\n", min(start + _PIECE, len(text)))
        end = len(text) if end < 0 else end + 1
        yield text[start:end]
        start = end
