"""A conversation whose state is kept, so that each turn prefills its own tokens only."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper

from supra_core.errors import SupraError
from supra_core.text import render_chat
from supra_mlx.generate import stream
from supra_mlx.model import Model

Message = dict[str, str]

# Turns that can be taken back; a snapshot costs one state (64 MiB for a 7B model).
_SNAPSHOTS = 8


@dataclass(frozen=True)
class _Snapshot:
    """A recurrent state cannot be wound back, only kept; its arrays are shared, not copied."""

    messages: tuple[Message, ...]
    tokens: tuple[int, ...]
    cache: tuple[Any, ...]


class Conversation:
    """Messages, the tokens the state has seen, and the state itself.

    The whole transcript is rendered by the chat template every turn; what the state has seen of
    it is not fed again. If the rendering differs from what was seen (a template may strip white
    space, or drop an earlier turn's reasoning), the last state that still fits is taken up.
    """

    def __init__(
        self, model: Model, tokenizer: TokenizerWrapper, *, system: str | None = None
    ) -> None:
        if not tokenizer.has_chat_template:
            raise SupraError(
                "the model's tokenizer has no chat template: use supra generate --raw, or a "
                "model made for chat"
            )
        self.model = model
        self.tokenizer = tokenizer
        self._system = system
        self._snapshots: list[_Snapshot] = []
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages: list[Message] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self.tokens: list[int] = []
        self.cache: list[Any] = self.model.make_cache()
        self.last_response: GenerationResponse | None = None
        self._snapshots.clear()

    def undo(self) -> bool:
        """Take the last turn back; False when there is none or it is too long ago."""
        if not self._snapshots:
            return False
        snapshot = self._snapshots.pop()
        self.messages = list(snapshot.messages)
        self._restore(snapshot)
        return True

    def reply(self, text: str, **settings: Any) -> Iterator[str]:
        """The answer to ``text``, piece by piece; ``settings`` are those of ``stream``.

        What has been said when the caller stops early stays in the conversation. When nothing
        has, the turn is taken back.
        """
        self._snapshots.append(self._snapshot())
        del self._snapshots[:-_SNAPSHOTS]
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        started = False
        try:
            new = self._unseen(self._render())
            for response in stream(self.model, self.tokenizer, new, cache=self.cache, **settings):
                # The generator feeds a token before it yields it.
                self.tokens += [response.token] if started else [*new, response.token]
                started = True
                self.last_response = response
                said.append(response.text)
                if response.text:
                    yield response.text
        finally:
            if started:
                self.messages.append({"role": "assistant", "content": "".join(said)})
            else:
                self.undo()

    def _render(self) -> list[int]:
        return [int(token) for token in render_chat(self.tokenizer, self.messages)]

    def _unseen(self, ids: list[int]) -> list[int]:
        """What of ``ids`` the state has yet to see; takes up an earlier state if need be."""
        if not self._fits(self.tokens, ids):
            for snapshot in reversed(self._snapshots):
                if self._fits(list(snapshot.tokens), ids):
                    self._restore(snapshot)
                    break
            else:
                self.tokens, self.cache = [], self.model.make_cache()
        return ids[len(self.tokens) :]

    @staticmethod
    def _fits(seen: list[int], ids: list[int]) -> bool:
        # At least one token must be left to predict from.
        return len(seen) < len(ids) and ids[: len(seen)] == seen

    def _snapshot(self) -> _Snapshot:
        cache = copy.deepcopy(self.cache)
        return _Snapshot(tuple(self.messages), tuple(self.tokens), tuple(cache))

    def _restore(self, snapshot: _Snapshot) -> None:
        self.tokens = list(snapshot.tokens)
        self.cache = copy.deepcopy(list(snapshot.cache))
