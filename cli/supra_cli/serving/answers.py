"""Responses in OpenAI's form, whole or as stream chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from supra_cli.serving.logprobs import Echo, in_chat, in_text, names
from supra_core.runtime.likelihood import Likelihood
from supra_core.runtime.scheduler import Finished, Piece, PromptLikelihoods
from supra_core.runtime.token_texts import Decode, Places

Heard = PromptLikelihoods | Piece | Finished


@dataclass
class Answers:
    """The answers of a request: ``each`` answers for each of ``prompts``.

    ``top``: number of top log-probabilities, None for no log-probabilities. ``echoes``: the
    prompts, if they are repeated before their answers.
    """

    chat: bool
    model: str
    prompts: int
    each: int
    top: int | None
    decode: Decode
    echoes: list[Echo] = field(default_factory=list)
    ident: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))
    texts: dict[int, str] = field(default_factory=dict)
    ends: dict[int, Finished] = field(default_factory=dict)
    _followed: dict[int, Sequence[Likelihood]] = field(default_factory=dict)
    _likelihoods: dict[int, list[Likelihood]] = field(default_factory=dict)
    _places: dict[int, Places] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._name = names(self.decode)

    @property
    def count(self) -> int:
        """Answers of all prompts."""
        return self.prompts * self.each

    def hear(self, index: int, event: Heard) -> None:
        """Record an event of answer ``index``."""
        if isinstance(event, Piece):
            self.texts[index] = self.texts.get(index, "") + event.text
            self._likelihoods.setdefault(index, []).extend(event.likelihoods)
        elif isinstance(event, Finished):
            self.ends[index] = event
        else:
            self._followed[index // self.each] = event.likelihoods

    def whole(self) -> dict[str, Any]:
        """The body of a response that is not streamed."""
        choices = []
        for index in range(self.count):
            text, finish = self.texts.get(index, ""), self.ends[index].finish
            said: dict[str, Any] = {"text": self._echoed(index) + text}
            if self.chat:
                said = {"message": {"role": "assistant", "content": text, "refusal": None}}
            said["logprobs"] = self._logprobs(index, self._likelihoods.get(index, []))
            if self._followed:
                before = self._prompt_logprobs(index)
                said["logprobs"] = {name: before[name] + said["logprobs"][name] for name in before}
            choices.append({"index": index, **said, "finish_reason": finish})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head(kind), "choices": choices, "usage": self.usage()}

    def opening(self) -> list[dict[str, Any]]:
        """The first chunks of a stream: the role, or echoed prompts without log-probabilities."""
        if self.chat:
            delta = {"role": "assistant", "content": ""}
            return [self._chunk(index, {"delta": delta}) for index in range(self.count)]
        if not self.echoes or self.top is not None:
            return []
        return [self._chunk(index, {"text": self._echoed(index)}) for index in range(self.count)]

    def chunks(self, index: int, event: Heard) -> list[dict[str, Any]]:
        """The stream chunks of an event."""
        if isinstance(event, PromptLikelihoods):
            logprobs = self._prompt_logprobs(index)
            echoed = {"text": self._echoed(index)}
            return [self._chunk(i, echoed, None, logprobs) for i in range(index, index + self.each)]
        if isinstance(event, Finished):
            empty: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
            return [self._chunk(index, empty, event.finish)]
        said = {"delta": {"content": event.text}} if self.chat else {"text": event.text}
        return [self._chunk(index, said, None, self._logprobs(index, event.likelihoods))]

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk, with ``include_usage``."""
        return {**self._head(self._kind), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Token counts; a prompt counts once for all its answers."""
        firsts = [self.ends[index] for index in range(0, self.count, self.each)]
        prompt = sum(end.prompt_tokens for end in firsts)
        known = sum(end.cached_tokens for end in firsts)
        said = sum(end.generated_tokens for end in self.ends.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": said,
            "total_tokens": prompt + said,
            "prompt_tokens_details": {"cached_tokens": known},
        }

    def _echoed(self, index: int) -> str:
        return self.echoes[index // self.each].text if self.echoes else ""

    def _prompt_logprobs(self, index: int) -> dict[str, Any]:
        prompt = index // self.each
        return in_text(self._followed[prompt], self._name, self.echoes[prompt].places())

    def _logprobs(self, index: int, found: Sequence[Likelihood]) -> dict[str, Any] | None:
        """Log-probabilities of an answer's next tokens."""
        if self.top is None:
            return None
        if self.chat:
            return in_chat(found, self._name)
        begun = Places(self.decode, len(self._echoed(index)))
        places = self._places.setdefault(index, begun)
        return in_text(found, self._name, [places.take(one.token) for one in found])

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

    def _chunk(
        self,
        index: int,
        said: Mapping[str, Any],
        finish: str | None = None,
        logprobs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head(self._kind), "choices": [choice]}
