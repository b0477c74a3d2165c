"""Text to tokens and back, for every engine with a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from supra_core.runtime.conversation import clock
from supra_core.runtime.token_texts import decode_within
from supra_core.text import ModelTokenizer
from supra_core.text.chat_template import ANSWER, Rendering


class TokenizedEngine:
    """The part of :class:`~supra_core.runtime.engine.Engine` that is about text."""

    tokenizer: ModelTokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a text that is to be continued."""
        return self.tokenizer.encode_prompt(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids as it is in the middle of a text, special tokens by their names."""
        return decode_within(self.tokenizer.raw, ids)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        now: datetime | None = None,
        how: Rendering = ANSWER,
    ) -> list[int]:
        """As the chat template has it; SupraError when there is none, or it refuses."""
        return self.tokenizer.render(messages, how, now or clock())
