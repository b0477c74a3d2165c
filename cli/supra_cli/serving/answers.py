"""Answers as OpenAI's interface writes them, whole or chunk by chunk."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from supra_core.scheduler import Finished, Piece


@dataclass
class Answers:
    """A request's answers, ``each`` prompt's one after the other, in the interface's words."""

    chat: bool
    model: str
    prompts: int
    each: int
    ident: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    texts: dict[int, str] = field(default_factory=dict)
    ends: dict[int, Finished] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Answers of all prompts."""
        return self.prompts * self.each

    def hear(self, index: int, event: Piece | Finished) -> None:
        """Take in what happened to answer ``index``."""
        if isinstance(event, Piece):
            self.texts[index] = self.texts.get(index, "") + event.text
        else:
            self.ends[index] = event

    def whole(self) -> dict[str, Any]:
        """The body of an answer in one piece."""
        choices = []
        for index in range(self.count):
            text, finish = self.texts.get(index, ""), self.ends[index].finish
            said: dict[str, Any] = {"text": text}
            if self.chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": finish})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The first chunks of a stream: who speaks."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(index, {"delta": delta}, None) for index in range(self.count)]

    def chunk(self, index: int, event: Piece | Finished) -> dict[str, Any]:
        """An event in a stream."""
        text = event.text if isinstance(event, Piece) else ""
        finish = event.finish if isinstance(event, Finished) else None
        if not self.chat:
            return self._chunk(index, {"text": text}, finish)
        return self._chunk(index, {"delta": {"content": text} if text else {}}, finish)

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, for those who asked for it."""
        return {**self._head(self._kind), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens; a prompt counts once, however many answers it has."""
        firsts = [self.ends[index] for index in range(0, self.count, self.each)]
        prompt = sum(end.prompt_tokens for end in firsts)
        known = sum(end.known_tokens for end in firsts)
        said = sum(end.said_tokens for end in self.ends.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
            "prompt_tokens_details": {"cached_tokens": known},
        }

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.ident}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }

    def _chunk(self, index: int, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": finish}
        return {**self._head(self._kind), "choices": [choice]}
