"""Sampling a text from a model, without the model: what each row does with each token.

Two kinds of sample. A document begins where the model's texts begin. A conversation is rendered by
the chat template up to where the user speaks, and the model says both sides (Magpie, arXiv
2406.08464).
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

# What ends a text in the tokenizers of the field, the most common first.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end▁of▁sentence|>")

# A text loops if in a stretch of this many tokens less than this share of its pieces is distinct.
LOOP_STRETCH, LOOP_PIECE, LOOP_DISTINCT = 128, 8, 0.5
# Below this many tokens a text is too short to say.
LOOP_LEAST = 24


@dataclass(frozen=True)
class Part:
    """What the model said in one go: its tokens, their text, and whether it ended by itself."""

    ids: tuple[int, ...]
    text: str
    ended: bool


@dataclass(frozen=True)
class Sample:
    """One sampled text. ``dropped`` is the reason why it is not used, or empty.

    ``tokens``: of the whole text, ``sampled``: of them those that the model chose, ends included.
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
    """One sample under way, fed with what the model would say next."""

    done: bool

    def next(self, sampled: int) -> int | None:
        """The token to feed: ``sampled``, or what the template puts there; None when done."""
        ...

    def sample(self) -> Sample:
        """What was sampled; a row that is not done is cut here."""
        ...


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer, with what a sampler has to know about its special tokens.

    ``start``: the token that documents begin with; ``end``: the one they end with;
    ``ends``: all that end a text; ``special``: all special tokens, id to marker.
    """

    tokenizer: ModelTokenizer
    start: int
    end: int
    ends: frozenset[int]
    special: Mapping[int, str]

    @property
    def size(self) -> int:
        """Ids that are tokens; a model's matrix may have more rows."""
        return self.tokenizer.raw.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, markers parsed and nothing added."""
        ids: list[int] = self.tokenizer.encode(text).ids.tolist()
        return ids

    def count(self, text: str) -> int:
        """How many tokens ``text`` is."""
        return len(self.encode(text))

    def marker(self, ident: int) -> str:
        """A token as the tokenizer's file spells it."""
        return str(self.tokenizer.raw.id_to_token(ident))

    def decode(self, ids: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text that ids add to the text of ``after``: some tokenizers drop leading spaces."""
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
    """What documents begin and end with, from the spec's ``bos`` and ``eos``.

    The end is the tokenizer's end-of-text marker, else ``eos``: a chat model's eos may be the end
    of a turn. Documents begin with ``bos`` unless the template opens each turn with it, and else
    with the end of the document before, as in training. FormatError if no token ends a text.
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
    """A text until one of the tokens that end it."""

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
        return Sample("document", whole, None, words.count(whole), sampled, self.done, dropped)


class Script:
    """A conversation's strings as tokens: what a row feeds between the messages.

    Spaces at the end of an opening are left to the model, whose words bring their own.
    """

    def __init__(self, words: Vocabulary, turns: ChatTurns, most: int) -> None:
        self.words, self.turns, self.most = words, turns, most
        self.opening = turns.opening.rstrip(" ")
        self.user_end = _End(words, turns.to_answer)
        self.answer_end = _End(words, turns.to_user)
        self.stops = words.ends | self.user_end.tokens | self.answer_end.tokens


class _End:
    """How a message ends: by a special token, or by a text that is none."""

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
    """User and assistant in turns, until there have been enough or there is no room."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._queue: deque[int] = deque()
        self._said: list[Part] = []
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
            # The mark has been said in plain tokens: only what comes after it is left to feed.
            self._close(self._text().split(end.mark)[0], [sampled, *end.rest])
        return None if self.done else self._queue.popleft()

    def sample(self) -> Sample:
        if not self.done and self._answering and self._ids:
            self._said.append(Part(tuple(self._ids), _whole(self._text()), False))
        said = self._said[: len(self._said) // 2 * 2]
        ended = bool(said) and said[-1].ended
        reasons = [fault(part, self._script.words) for part in said] or ["no answer"]
        messages = [
            {"role": ("user", "assistant")[index % 2], "content": part.text.strip()}
            for index, part in enumerate(said)
        ]
        text = self._rendered(said)
        return Sample(
            "conversation", text, messages, self._script.words.count(text), self._sampled, ended,
            next((reason for reason in reasons if reason), ""),
        )  # fmt: skip

    @property
    def _answering(self) -> bool:
        return len(self._said) % 2 == 1

    def _close(self, text: str, following: list[int]) -> None:
        """The message under way has ended: the template goes on, if there is anything to add."""
        self._said.append(Part(tuple(self._ids), text, True))
        self._ids, self._context = [], following
        self._queue.extend(following)
        empty = not text.strip()
        self.done = empty or len(self._said) == 2 * self._script.most
        if empty and len(self._said) > 2:
            # What went before is a conversation by itself.
            del self._said[-2 if len(self._said) % 2 == 0 else -1 :]

    def _text(self) -> str:
        return self._script.words.decode(self._ids, self._context)

    def _tail(self, characters: int) -> str:
        """The text of the latest tokens: a token is a character or more, or a byte of one."""
        return self._script.words.decode(self._ids[-4 * characters :])

    def _rendered(self, said: Sequence[Part]) -> str:
        turns, script = self._script.turns, self._script
        text = script.opening
        for index, part in enumerate(said):
            text += part.text
            if index % 2 == 0:
                text += script.user_end.text
            elif index + 1 < len(said):
                text += script.answer_end.text
            elif part.ended:
                text += turns.closing
        end = script.words.marker(script.words.end)
        return text if text.endswith(end) else text + end


def fault(part: Part, words: Vocabulary) -> str:
    """Why a text is of no use: ``empty``, ``loop``, ``marker``; empty if it is.

    ``marker``: special tokens spelled in plain ones, which would be parsed as what they spell.
    """
    if not part.text.strip():
        return "empty"
    if loops(part.ids):
        return "loop"
    if any(marker in part.text for marker in words.special.values()):
        return "marker"
    return ""


def loops(ids: Sequence[int]) -> bool:
    """Whether some stretch of the tokens says the same again and again.

    In a stretch of LOOP_STRETCH tokens (or all, if they are fewer, but at least LOOP_LEAST), less
    than LOOP_DISTINCT of the pieces of LOOP_PIECE tokens are distinct.
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
    """A text that was cut, without the half of a character that it may end with."""
    return text.rstrip("\ufffd")
