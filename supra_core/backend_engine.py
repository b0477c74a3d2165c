"""Any backend that speaks: our own loop over prefill and decode steps."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from supra_core.backend import Backend, Logits, StateArrays
from supra_core.conversation import Message
from supra_core.errors import SupraError
from supra_core.generate import REPETITION_CONTEXT, Sampling, continuation
from supra_core.progress import Progress, silent
from supra_core.text import render_chat

# Tokens fed at once: a backend returns the logits of all of them.
_PIECE = 512


@dataclass
class Held:
    """A backend's state, and the last of the tokens it has seen."""

    state: Any = None
    recent: tuple[int, ...] = ()


class BackendEngine:
    """:class:`~supra_core.conversation.Engine` over a backend and transformers' tokenizer."""

    def __init__(self, model: Backend, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.backend = model.name

    def encode(self, text: str) -> list[int]:
        """Token ids of a text as it stands."""
        return [int(token) for token in self.tokenizer.encode(text)]

    def render(self, messages: Sequence[Message]) -> list[int]:
        """As the chat template has it; SupraError when the tokenizer has none."""
        if not self.tokenizer.chat_template:
            raise SupraError(
                "the model's tokenizer has no chat template: use supra generate --raw, or a "
                "model made for chat"
            )
        return render_chat(self.tokenizer, list(messages))

    def fresh(self) -> Held:
        """The state before the first token."""
        return Held()

    def copy(self, state: Held) -> Held:
        """The same arrays, which no backend changes in place."""
        return Held(state.state, state.recent)

    def feed(self, ids: Sequence[int], state: Held, progress: Progress = silent) -> None:
        """Show ``ids`` to ``state``."""
        for start in range(0, len(ids), _PIECE):
            part = ids[start : start + _PIECE]
            self._show(part, state)
            progress("read", start + len(part), len(ids))

    def speak(
        self, ids: Sequence[int], state: Held, sampling: Sampling, progress: Progress = silent
    ) -> Generator[tuple[int, str]]:
        """Tokens after ``ids`` with their text, up to the end of the turn, which is none."""
        if not len(ids):
            raise SupraError("the prompt is empty: give at least one token to go on from")
        self.feed(ids[:-1], state, progress)
        logits = self._show(ids[-1:], state)[0, -1]
        text = _detokenizer(self.tokenizer)
        for token, after in continuation(self.model, logits, state.state, state.recent, sampling):
            state.state, state.recent = after, _recent(state.recent, [token])
            yield token, text(token)

    def arrays(self, state: Held) -> StateArrays:
        """The backend's own names, and ``recent``."""
        if state.state is None:
            return {}
        recent = np.array(state.recent, dtype=np.int64)
        return {**self.model.state_arrays(state.state), "recent": recent}

    def restored(self, arrays: StateArrays) -> Held:
        """The inverse of :meth:`arrays`."""
        if not arrays:
            return Held()
        rest = {name: array for name, array in arrays.items() if name != "recent"}
        recent = arrays.get("recent", np.zeros(0, dtype=np.int64))
        return Held(self.model.state_from_arrays(rest), tuple(recent.tolist()))

    def _show(self, ids: Sequence[int], state: Held) -> Logits:
        logits, state.state = self.model.prefill(np.array([ids], dtype=np.int64), state.state)
        state.recent = _recent(state.recent, ids)
        return logits


def _recent(before: Sequence[int], new: Sequence[int]) -> tuple[int, ...]:
    return (*before, *new)[-REPETITION_CONTEXT:]


def _detokenizer(tokenizer: Any) -> Callable[[int], str]:
    """Token -> the text that became certain with it; a character may span several tokens."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    return lambda token: stream.step(tokenizer.backend_tokenizer, token) or ""
