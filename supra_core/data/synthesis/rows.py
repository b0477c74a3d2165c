"""Rows of a synthesis: which token each row feeds to the model, and the sample it becomes.

There are two kinds of sample. A document begins where the model's texts begin. A conversation is
rendered by the chat template up to the user's first message, and the model generates both sides
(Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from supra_core.errors import FormatError
from supra_core.text.chat_template import ChatTurns

if TYPE_CHECKING:
    from supra_core.text import ModelTokenizer

Kind = Literal["document", "conversation"]
KINDS: tuple[Kind, ...] = ("document", "conversation")

# Tokens that end a text in common tokenizers, the most common first.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")

# Tokens of a stretch and of a piece, and the share of distinct pieces below which a text loops.
LOOP_STRETCH, LOOP_PIECE, LOOP_DISTINCT = 128, 8, 0.5
# Tokens below which a text is too short to tell.
LOOP_LEAST = 24


@dataclass(frozen=True)
class Part:
    """A generated message or document: tokens, text, and whether the model ended it."""

    ids: tuple[int, ...]
    text: str
    ended: bool


@dataclass(frozen=True)
class Sample:
    """One sampled text. ``dropped`` is the reason why it is not used, or empty.

    ``tokens``: of the whole text; ``sampled``: those that the model chose, ends included.
    ``messages`` is None for a document.
    """

    kind: Kind
    text: str
    messages: list[dict[str, str]] | None
    tokens: int
    sampled: int
    finished: bool
    dropped: str


class Row(Protocol):
    """One unfinished sample, which takes the tokens that the model samples."""

    done: bool

    def next(self, sampled: int) -> int | None:
        """The token to feed: ``sampled``, or what the template puts there; None when done."""
        ...

    def sample(self) -> Sample:
        """The sampled text; a row that is not done is cut here."""
        ...


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer with its special tokens.

    ``start`` and ``end``: the tokens around documents; ``ends``: all that end a text;
    ``special``: all special tokens, id to marker.
    """

    tokenizer: ModelTokenizer
    start: int
    end: int
    ends: frozenset[int]
    special: Mapping[int, str]

    @property
    def size(self) -> int:
        """The number of tokens; a model's matrix may have more rows."""
        return self.tokenizer.raw.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, markers parsed and nothing added."""
        ids: list[int] = self.tokenizer.encode(text).ids.tolist()
        return ids

    def marker(self, ident: int) -> str:
        """A token as the tokenizer's file spells it."""
        return str(self.tokenizer.raw.id_to_token(ident))

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text that ``ids`` add to that of ``after``: some tokenizers drop leading spaces."""
        before = self.tokenizer.decode(after, special=True)
        whole = self.tokenizer.decode([*after, *ids], special=True)
        return whole[len(before) :]


def vocabulary(
    tokenizer: ModelTokenizer,
    bos: int | None,
    eos: Sequence[int],
    turns: ChatTurns | None,
    where: str,
) -> Vocabulary:
    """The tokens around documents, from the spec's ``bos`` and ``eos``.

    The end is the tokenizer's end-of-text marker, else ``eos``: a chat model's eos may end a turn.
    Documents begin with ``bos`` unless the template opens each turn with it; then, as in training,
    with the end of the document before. FormatError if no token ends a text.
    """
    special = {
        ident: token.content
        for ident, token in tokenizer.raw.get_added_tokens_decoder().items()
        if token.special
    }
    idents = {marker: ident for ident, marker in special.items()}
    known = [idents[marker] for marker in _END_OF_TEXT if marker in idents]
    if not known and not eos:
        raise FormatError(
            f"{where} names no token that ends a text: add eos_token_id to its config.json"
        )
    end = known[0] if known else eos[0]
    ends = frozenset([*known, *eos])
    opens_turns = turns is not None and special.get(bos if bos is not None else -1, "\0") in (
        turns.to_answer + turns.to_user
    )
    start = end if bos is None or opens_turns else bos
    return Vocabulary(tokenizer, start, end, ends - {start} | {end}, special)


class DocumentRow:
    """A document, up to a token that ends it."""

    def __init__(self, words: Vocabulary) -> None:
        self._words = words
        self._ids: list[int] = []
        self.done = False

    def next(self, sampled: int) -> int | None:
        if sampled in self._words.ends:
            self.done = True
            return None
        self._ids.append(sampled)
        return sampled

    def sample(self) -> Sample:
        words = self._words
        text = words.decode(self._ids, [words.start])
        part = Part(tuple(self._ids), text if self.done else _whole(text), self.done)
        opening = "" if words.start == words.end else words.marker(words.start)
        whole = opening + part.text + words.marker(words.end)
        dropped = fault(part, words)
        sampled = len(self._ids) + self.done
        return Sample(
            "document", whole, None, len(words.encode(whole)), sampled, self.done, dropped
        )


class Script:
    """A conversation's strings as tokens: what a row feeds between the messages.

    Spaces at the end of an opening are left to the model, whose words begin with them.
    """

    def __init__(self, words: Vocabulary, turns: ChatTurns, most: int) -> None:
        self.words, self.turns, self.most = words, turns, most
        self.opening = turns.opening.rstrip(" ")
        self.user_end = _End(words, turns.to_answer)
        self.answer_end = _End(words, turns.to_user)
        self.stops = words.ends | self.user_end.tokens | self.answer_end.tokens


class _End:
    """How a message ends: by a special token, or by plain text."""

    def __init__(self, words: Vocabulary, between: str) -> None:
        self.text = between.rstrip(" ")
        self.ids = words.encode(self.text)
        stripped = words.encode(self.text.lstrip(" "))
        special = bool(stripped) and stripped[0] in words.special
        self.tokens = frozenset(stripped[:1]) if special else frozenset()
        mark = self.text.lstrip(" ").rstrip()
        self.mark = "" if special else mark
        rest = self.text.lstrip(" ")[len(mark) :]
        self.rest = words.encode(rest) if rest else []


class ConversationRow:
    """Messages of user and assistant in turns, up to a number of turns or the row's end."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._queue: deque[int] = deque()
        self._parts: list[Part] = []
        self._ids: list[int] = []
        self._context: list[int] = script.words.encode(script.opening)
        self._sampled = 0
        self.done = False

    def next(self, sampled: int) -> int | None:
        if self._queue:
            return self._queue.popleft()
        self._sampled += 1
        end = self._script.answer_end if self._answering else self._script.user_end
        if sampled in self._script.stops:
            self._close(self._text(), end.ids)
        else:
            self._ids.append(sampled)
            if not end.mark or end.mark not in self._tail(len(end.mark)):
                return sampled
            # The model generated the mark in plain tokens: only the text after it is left to feed.
            self._close(self._text().split(end.mark)[0], [sampled, *end.rest])
        return None if self.done else self._queue.popleft()

    def sample(self) -> Sample:
        if not self.done and self._answering and self._ids:
            self._parts.append(Part(tuple(self._ids), _whole(self._text()), False))
        parts = self._parts[: len(self._parts) // 2 * 2]
        ended = bool(parts) and parts[-1].ended
        reasons = [fault(part, self._script.words) for part in parts] or ["no answer"]
        messages = [
            {"role": ("user", "assistant")[index % 2], "content": part.text.strip()}
            for index, part in enumerate(parts)
        ]
        text = self._rendered(parts)
        tokens, dropped = len(self._script.words.encode(text)), next(filter(None, reasons), "")
        return Sample("conversation", text, messages, tokens, self._sampled, ended, dropped)

    @property
    def _answering(self) -> bool:
        return len(self._parts) % 2 == 1

    def _close(self, text: str, following: list[int]) -> None:
        """End the current message; the template's tokens follow."""
        self._parts.append(Part(tuple(self._ids), text, True))
        self._ids, self._context = [], following
        self._queue.extend(following)
        empty = not text.strip()
        self.done = empty or len(self._parts) == 2 * self._script.most
        if empty and len(self._parts) > 2:
            # The messages before it are a conversation.
            del self._parts[-2 if len(self._parts) % 2 == 0 else -1 :]

    def _text(self) -> str:
        return self._script.words.decode(self._ids, self._context)

    def _tail(self, characters: int) -> str:
        """At least the last ``characters`` of the text: a token is at least a byte of one."""
        return self._script.words.decode(self._ids[-4 * characters :])

    def _rendered(self, parts: Sequence[Part]) -> str:
        script, text = self._script, self._script.opening
        for index, part in enumerate(parts):
            between = script.answer_end.text if index % 2 else script.user_end.text
            if index + 1 == len(parts):
                between = script.turns.closing if part.ended else ""
            text += part.text + between
        end = script.words.marker(script.words.end)
        return text if text.endswith(end) else text + end


def fault(part: Part, words: Vocabulary) -> str:
    """Why a text cannot be used: ``empty``, ``loop`` or ``marker``; empty if it can.

    ``marker``: special tokens spelled in plain ones, which would be parsed as special tokens.
    """
    if not part.text.strip():
        return "empty"
    if loops(part.ids):
        return "loop"
    if any(marker in part.text for marker in words.special.values()):
        return "marker"
    return ""


def loops(ids: Sequence[int]) -> bool:
    """Whether some stretch of the tokens repeats itself.

    In a stretch of LOOP_STRETCH tokens (all if fewer, at least LOOP_LEAST), less than LOOP_DISTINCT
    of the pieces of LOOP_PIECE tokens are distinct.
    """
    if len(ids) < LOOP_LEAST:
        return False
    pieces = np.lib.stride_tricks.sliding_window_view(np.asarray(ids), LOOP_PIECE)
    _, names = np.unique(pieces, axis=0, return_inverse=True)
    width = min(LOOP_STRETCH, len(ids)) - LOOP_PIECE + 1
    stretches = np.sort(np.lib.stride_tricks.sliding_window_view(names.reshape(-1), width), axis=1)
    distinct = 1 + (np.diff(stretches, axis=1) != 0).sum(axis=1)
    return bool(distinct.min() < LOOP_DISTINCT * width)


def _whole(text: str) -> str:
    """A cut text without a partial character at its end."""
    return text.rstrip("\ufffd")
