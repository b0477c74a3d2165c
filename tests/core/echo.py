"""An engine of a few lines."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np

from supra_core.backend import StateArrays
from supra_core.batch import Batch, InTurns
from supra_core.conversation import Message
from supra_core.generate import Sampling
from supra_core.progress import Progress, silent


class Echo:
    """Characters are tokens; a state is what it has seen, and an answer depends on all of it."""

    backend = "echo"

    def __init__(self, trim: bool = False) -> None:
        self.trim, self.fed = trim, 0

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def render(self, messages: Sequence[Message]) -> list[int]:
        said = [
            (m["role"][0], m["content"].strip() if self.trim else m["content"]) for m in messages
        ]
        return self.encode("".join(f"<{role}>{text}</>" for role, text in said) + "<a>")

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
    ) -> Generator[tuple[int, str]]:
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
