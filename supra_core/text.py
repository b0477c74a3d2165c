"""Text to token ids, with a model's own tokenizer and nothing added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from supra_core.errors import FormatError, SupraError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class EncodedText:
    """A text, its token ids (T,), and the character where each token ends (T,)."""

    text: str
    ids: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    def head(self, tokens: int) -> EncodedText:
        """The first ``tokens`` tokens."""
        return EncodedText(self.text, self.ids[:tokens], self.ends[:tokens])

    def byte_count(self, start: int, stop: int) -> int:
        """UTF-8 bytes of tokens start .. stop - 1."""
        first = int(self.ends[start - 1]) if start else 0
        return len(self.text[first : int(self.ends[stop - 1])].encode())


def load_tokenizer(assets: Mapping[str, bytes], where: str) -> Tokenizer:
    """The tokenizer among a source's assets; ``where`` names the source in errors."""
    from tokenizers import Tokenizer

    if TOKENIZER not in assets:
        raise FormatError(
            f"{where} has no {TOKENIZER}: give token ids, or add the file from the source model"
        )
    try:
        return Tokenizer.from_str(assets[TOKENIZER].decode())
    # The library raises bare Exception for everything it cannot read.
    except Exception as error:
        raise FormatError(f"{where}: {TOKENIZER} cannot be read ({error}): get it again") from None


def render_chat(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The conversation's token ids by the tokenizer's chat template, up to the next answer.

    ``tokenizer`` is one of transformers' or mlx-lm's. Raises SupraError when it has no template,
    :class:`FormatError` when the template is broken or refuses the messages.
    """
    # mlx-lm's wrapper may have one of its own.
    if not getattr(tokenizer, "has_chat_template", tokenizer.chat_template):
        raise SupraError(
            "the model's tokenizer has no chat template: use supra generate --raw, or a "
            "model made for chat"
        )
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False
        )
    # A template is a program of someone else's: it may fail in any way.
    except Exception as error:
        raise FormatError(
            f"the model's chat template cannot be rendered ({error}): correct chat_template.jinja"
        ) from None
    return ids


def detokenizer(tokenizer: Any) -> Callable[[int], str]:
    """Token -> the text that became certain with it; a character may span several tokens.

    ``tokenizer`` is transformers'. Special tokens are no text.
    """
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    return lambda token: stream.step(tokenizer.backend_tokenizer, token) or ""


def encode(tokenizer: Tokenizer, text: str) -> EncodedText:
    """Token ids of ``text`` as it stands: no BOS, no template."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)
    return EncodedText(text, np.array(encoding.ids, dtype=np.int64), ends)


def read_text(path: str | Path) -> str:
    """A UTF-8 file as one string; :class:`FormatError` if it is absent, empty or no text."""
    path = Path(path)
    try:
        # newline="" keeps the file's own line ends: they are part of what is measured.
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
    except OSError as error:
        reason = error.strerror or str(error)
        raise FormatError(f"{path} cannot be read ({reason}): name a text file") from None
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it first"
        ) from None
    except ValueError as error:
        raise FormatError(f"{path} cannot be read ({error}): name a text file") from None
    if not text:
        raise FormatError(f"{path} is empty: name a file with text in it")
    return text
