"""An engine of a few lines."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from datetime import datetime

import numpy as np

from supra_core.backend import StateArrays
from supra_core.batch import Batch, InTurns
from supra_core.conversation import Message
from supra_core.generate import Sampling
from supra_core.progress import Progress, silent


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

    def render(self, messages: Sequence[Message], now: datetime | None = None) -> list[int]:
        said = [
            (m["role"][0], m["content"].strip() if self.trim else m["content"]) for m in messages
        ]
        day = f"[{now or datetime.now():%Y-%m-%d}]" if self.dated else ""
        return self.encode(day + "".join(f"<{role}>{text}</>" for role, text in said) + "<a>")

    def fresh(self) -> list[int]:
        return []

    def copy(self, state: list[int]) -> list[int]:
        return list(state)

    def feed(self, ids: Sequence[int], state: list[int], progress: Progress = silent) -> None:
        self.fed += len(ids)
        state += ids

    def speak(
        self,
        ids: Sequence[int],
        state: list[int],
        sampling: Sampling,
        progress: Progress,
        seen: Sequence[int] = (),
        continues: bool = False,
    ) -> Generator[tuple[int, str]]:
        self.continued.append(continues)
        self.feed(ids, state, progress)
        for _ in range(sampling.max_tokens):
            letter = chr(ord("a") + sum(state) % 26)
            state.append(ord(letter))
            yield ord(letter), letter

    def batch(self, size: int) -> Batch:
        return InTurns(self)

    def arrays(self, state: list[int]) -> StateArrays:
        return {"seen": np.array(state, dtype=np.int32)}

    def restored(self, arrays: StateArrays) -> list[int]:
        return arrays["seen"].tolist()
