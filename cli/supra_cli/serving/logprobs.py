"""Log-probabilities in OpenAI's two forms: one for chats, one for completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from supra_core.runtime.likelihood import Likelihood
from supra_core.runtime.token_texts import UNKNOWN, Decode, Places

# The smallest one: JSON has no infinity.
_LEAST = -9999.0

Name = Callable[[int], str]


def names(decode: Decode) -> Name:
    """A function from a token to its text inside a text."""
    return lru_cache(maxsize=2**16)(lambda token: decode([token]))


def in_chat(found: Sequence[Likelihood], name: Name) -> dict[str, Any]:
    """``logprobs`` of a chat completion's choice."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text = name(token)
        # A part of a character has no text of its own.
        coded = None if UNKNOWN in text else list(text.encode())
        return {"token": text, "logprob": _written(logprob), "bytes": coded}

    entries = [
        {**entry(one.token, one.logprob), "top_logprobs": [entry(*other) for other in one.top]}
        for one in found
    ]
    return {"content": entries, "refusal": None}


def in_text(found: Sequence[Likelihood], name: Name, places: Sequence[int]) -> dict[str, Any]:
    """``logprobs`` of a completion's choice; ``places``: the offset of each token."""
    return {
        "tokens": [name(one.token) for one in found],
        "token_logprobs": [_written(one.logprob) for one in found],
        "top_logprobs": [_likeliest(one, name) for one in found],
        "text_offset": list(places),
    }


class Echo:
    """A prompt repeated before its answers; ``text`` None: it was given as ``ids``."""

    def __init__(self, text: str | None, ids: Sequence[int], decode: Decode) -> None:
        self._ids, self._decode = ids, decode
        self.text = decode(ids) if text is None else text

    def places(self) -> list[int]:
        """The offset in characters of each of its tokens."""
        places = Places(self._decode)
        found = [places.take(token) for token in self._ids]
        # Tokens that the tokenizer adds, such as BOS, are not in the text.
        before = len(places.rest()) - len(self.text)
        return [max(0, place - before) for place in found]


def _likeliest(one: Likelihood, name: Name) -> dict[str, Any] | None:
    """Top log-probabilities by text; of tokens with the same text the likeliest counts."""
    if one.logprob is None:
        return None
    top: dict[str, Any] = {}
    for token, logprob in (*one.top, (one.token, one.logprob)):
        top.setdefault(name(token), _written(logprob))
    return top


def _written(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST)
