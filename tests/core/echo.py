"""An engine of a few lines."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from datetime import datetime

import numpy as np

from supra_core.progress import Progress, silent
from supra_core.runtime.backend import StateArrays
from supra_core.runtime.batch import SequentialBatch
from supra_core.runtime.engine import Batch, Message
from supra_core.runtime.likelihood import Likelihood, Logits, likelihood
from supra_core.runtime.sampling import OnToken, Sampling
from supra_core.text.chat_template import ANSWER, Rendering


class Echo:
    """Characters are tokens; a state is what it has seen, and an answer depends on all of it.

    ``trim``: its template strips contents; ``dated``: it begins with the day. ``continued``: of
    each text that was spoken, whether it went on from the prompt's.
    """

    backend = "echo"

    def __init__(self, trim: bool = False, dated: bool = False) -> None:
        self.trim, self.dated, self.fed = trim, dated, 0
        self.continued: list[bool] = []

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def render(
        self,
        messages: Sequence[Message],
        now: datetime | None = None,
        how: Rendering = ANSWER,
    ) -> list[int]:
        said = [
            (m["role"][0], m["content"].strip() if self.trim else m["content"]) for m in messages
        ]
        day = f"[{now or datetime.now():%Y-%m-%d}]" if self.dated else ""
        whole = day + "".join(f"<{role}>{text}</>" for role, text in said)
        if how.continues:
            return self.encode(whole.removesuffix("</>"))
        return self.encode(whole + ("<a>" if how.answer_next else ""))

    def fresh(self) -> list[int]:
        return []

    def copy(self, state: list[int]) -> list[int]:
        return list(state)

    def feed(self, ids: Sequence[int], state: list[int], progress: Progress = silent) -> None:
        self.fed += len(ids)
        state += ids

    def score(
        self, ids: Sequence[int], following: Sequence[int], state: list[int], top: int
    ) -> list[Likelihood]:
        found = []
        for token, after in zip(ids, following, strict=True):
            self.feed([token], state)
            found.append(likelihood(self._logits(state), after, top))
        return found

    def generate(
        self,
        ids: Sequence[int],
        state: list[int],
        sampling: Sampling,
        progress: Progress,
        seen: Sequence[int] = (),
        continues: bool = False,
        on_token: OnToken | None = None,
    ) -> Generator[tuple[int, str]]:
        self.continued.append(continues)
        self.feed(ids, state, progress)
        for _ in range(sampling.max_tokens):
            letter = chr(self._logits(state).argmax())
            if on_token is not None:
                on_token(self._logits(state), ord(letter))
            state.append(ord(letter))
            yield ord(letter), letter

    @staticmethod
    def _logits(state: list[int]) -> Logits:
        """The likeliest is one of 26 letters; the next ones are likelier than those far from it."""
        return -np.abs(np.arange(256) - ord("a") - sum(state) % 26).astype(np.float32)

    def batch(self, size: int) -> Batch:
        return SequentialBatch(self)

    def arrays(self, state: list[int]) -> StateArrays:
        return {"seen": np.array(state, dtype=np.int32)}

    def restored(self, arrays: StateArrays) -> list[int]:
        return arrays["seen"].tolist()
