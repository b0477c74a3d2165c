"""Text to token ids, with a model's own tokenizer and nothing added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from supra_core.chat_template import with_time
from supra_core.errors import FormatError, SupraError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER = "tokenizer.json"

# Tokens of a prompt that its continuation is decoded with.
_CONTEXT = 16
# What stands for bytes that are no whole character.
_UNKNOWN = "\ufffd"


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
    """The tokenizer among a source's assets; ``where`` names the source in errors.

    It encodes texts whole and alone: what its file says of truncation and padding is left out.
    """
    from tokenizers import Tokenizer

    if TOKENIZER not in assets:
        raise FormatError(
            f"{where} has no {TOKENIZER}: give token ids, or add the file from the source model"
        )
    try:
        tokenizer = Tokenizer.from_str(assets[TOKENIZER].decode())
    # The library raises bare Exception for everything it cannot read.
    except Exception as error:
        raise FormatError(f"{where}: {TOKENIZER} cannot be read ({error}): get it again") from None
    # Whoever saved the file left these set: every text would be cut, or filled up with pads.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def render_chat(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], now: datetime | None = None
) -> list[int]:
    """The conversation's token ids by the tokenizer's chat template, up to the next answer.

    ``tokenizer`` is one of transformers' or mlx-lm's; ``now`` is what the template is told when it
    asks for the time, None: the clock's. Raises SupraError when it has no template,
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
            list(messages),
            add_generation_prompt=True,
            return_dict=False,
            **_template_at(tokenizer, now),
        )
    # A template is a program of someone else's: it may fail in any way.
    except Exception as error:
        raise FormatError(
            f"the model's chat template cannot be rendered ({error}): correct chat_template.jinja"
        ) from None
    return ids


def _template_at(tokenizer: Any, now: datetime | None) -> dict[str, str]:
    """The argument of ``apply_chat_template`` for another time than the clock's, if it matters."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        # Several by name, of which transformers takes this one where none is named.
        template = template.get("default")
    if now is None or not isinstance(template, str):
        return {}
    dated = with_time(template, now)
    return {} if dated == template else {"chat_template": dated}


def detokenizer(tokenizer: Any, after: Sequence[int] = ()) -> Callable[[int], str]:
    """Token -> the text that became certain with it; a character may span several tokens.

    ``tokenizer`` is transformers'. Special tokens are no text. ``after``: the tokens that the text
    goes on from; without any it begins a text, at whose beginning some tokenizers drop a space.
    """
    return _TextStream(tokenizer.backend_tokenizer, after).take


class _TextStream:
    """Tokens decoded together with those of the piece before, whose text is known.

    As tokenizers' own DecodeStream, which fails where bytes that are no character follow others
    that are.
    """

    def __init__(self, tokenizer: Tokenizer, after: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = self._whole(list(after)[-_CONTEXT:])
        self._known, self._known_ids = self._decode(self._ids), len(self._ids)

    def take(self, token: int) -> str:
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(_UNKNOWN):
            # The next token may complete the character.
            return ""
        new_ids = self._ids[self._known_ids :]
        whole = text.startswith(self._known)
        piece = text[len(self._known) :] if whole else self._decode(new_ids)
        if piece:
            self._ids, self._known = new_ids, self._decode(new_ids)
            self._known_ids = len(new_ids)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _whole(self, ids: list[int]) -> list[int]:
        """The last of ``ids`` that are whole characters; none where they end inside one."""
        for start in range(len(ids)):
            text = self._decode(ids[start:])
            if not text.startswith(_UNKNOWN) and not text.endswith(_UNKNOWN):
                return ids[start:]
        return []


def encode(tokenizer: Tokenizer, text: str) -> EncodedText:
    """Token ids of ``text`` as it stands: no BOS, no template."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    ends = np.array([end for _, end in encoding.offsets], dtype=np.int64)
    return EncodedText(text, np.array(encoding.ids, dtype=np.int64), ends)


def leading_ids(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer itself puts in front of every text: the BOS of Llama, Mistral, Gemma."""
    encoding = tokenizer.encode("x")
    added = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [index for index, _ in takewhile(lambda token: token[1], added)]


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of ``text`` behind the :func:`leading_ids`, as the lm-eval harness feeds a prompt.

    A text that begins with them itself gets no second ones.
    """
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    leading = leading_ids(tokenizer)
    return ids if ids[: len(leading)] == leading else leading + ids


def leading_form(tokenizer: Tokenizer) -> str:
    """How results state the :func:`leading_ids`."""
    names = [str(tokenizer.id_to_token(index)) for index in leading_ids(tokenizer)]
    return f"behind the tokenizer's own {' '.join(names)}" if names else "no BOS"


def same_stretch(tokenizer: Tokenizer, text: EncodedText) -> tuple[EncodedText, bool]:
    """The characters of ``text`` by another tokenizer, and whether it divides them alike.

    Where it does, perplexities of the two compare; else only what is counted a byte.
    """
    other = encode(tokenizer, text.text).head(len(text.ids))
    if np.array_equal(other.ids, text.ids):
        return other, True
    return encode(tokenizer, text.text[: int(text.ends[-1])]), False


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
