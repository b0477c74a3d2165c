"""The document of one record, by the same rules for every kind of file."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from supra_core.errors import SupraError
from supra_core.formats.jsonfile import parse, reason
from supra_core.text.plain import fault, plain

# Characters of a text that are tokenised together.
_PIECE = 200_000
# In the usual tokenizers, no token spans a letter or digit and the line end after it.
_BORDER = re.compile(r"(?<=\w)\n")
# Fields that may hold a record's document, unless one is named; the first not empty counts.
_TALKS, _IDS, _ALPACA = ("messages", "conversations"), ("tokens", "input_ids"), "instruction"
FIELDS = ("text", *_TALKS, _ALPACA, *_IDS)
# Further fields of a conversation.
_ANSWER, _MATERIAL, _SYSTEM = "output", "input", "system"
# ShareGPT's names for the roles of messages.
_ROLES = {"human": "user", "gpt": "assistant"} | {
    role: role for role in ("user", "assistant", "system", "tool")
}

Message = Mapping[str, Any]
Render = Callable[[list[Message]], npt.NDArray[np.int64]]


class BadRecord(SupraError):
    """A record that is not a document; the next may be one."""


@dataclass(frozen=True)
class Document:
    """A text in lazily read pieces, or token ids; ``where`` names it in errors.

    ``is_closed``: it includes its end, as conversations and token ids do.
    """

    where: str
    pieces: Iterable[str] = ()
    ids: npt.NDArray[np.int64] | None = None
    is_closed: bool = False


Record = Document | BadRecord


@dataclass
class Reading:
    """How to read: a record's ``field`` (None: the first of FIELDS that is not empty), the hub's
    ``split``, ``render`` from a conversation's messages to token ids, and the vocabulary's size.

    ``bytes_read``: the reader's position in the files. ``left_out`` counts by ending the files of
    folders and the members of archives that were not read.
    """

    field: str | None = None
    split: str = "train"
    render: Render | None = None
    vocab_size: int = 2**32
    bytes_read: int = 0
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)


# --- texts ------------------------------------------------------------------------------------


def border(text: str) -> int:
    """The length of the first piece of ``text``, which no token crosses; 0: not yet known."""
    found = _BORDER.search(text, _PIECE)
    if found:
        return found.start()
    # A text without such lines is cut anywhere.
    return _PIECE if len(text) > 4 * _PIECE else 0


def pieces(text: str) -> Iterator[str]:
    """A whole text in pieces that together have its tokens."""
    while len(text) > 4 * _PIECE:
        end = border(text)
        yield text[:end]
        text = text[end:]
    yield text


def _plain(text: str, where: str) -> str:
    if wrong := fault(text):
        raise BadRecord(f"{where} {wrong}: correct it")
    return plain(text)


# --- records ----------------------------------------------------------------------------------


def columns(names: Iterable[str], where: str, reading: Reading) -> list[str]:
    """The columns of a table that hold documents; BadRecord when there are none."""
    names = list(names)
    if not any(name in names for name in _wanted(reading)):
        other = next((mark for mark in ";|\t," if len(names) == 1 and mark in names[0]), None)
        if other is not None:
            raise BadRecord(
                f"{where} has one column, {names[0]!r}, in which {other!r} looks like the "
                "separator: write .csv with commas, .tsv with tabs"
            )
        raise BadRecord(_without(reading, f"{where} has no column", names))
    used = [n for n in names if n in (*_wanted(reading), _ANSWER, _MATERIAL, _SYSTEM)]
    if len(set(used)) < len(used):
        raise BadRecord(f"{where} has two columns of one name among {', '.join(used)}: rename one")
    return used


def document(record: Any, where: str, reading: Reading) -> Document:
    """The document of one record; :class:`BadRecord` when it has none."""
    if isinstance(record, list):
        return _from_ids(record, where, reading)
    if not isinstance(record, dict):
        raise BadRecord(f"{where} is not an object: correct it")
    there = [name for name in _wanted(reading) if name in record]
    if not there:
        raise BadRecord(_without(reading, f"{where} has no field", record))
    # Tables have every column in every row, most of them null or empty.
    there = [n for n in there if record[n] is not None] or there
    name = next((n for n in there if record[n]), there[0])
    value, place = record[name], f"{where}: {name}"
    if name == _ALPACA and _ANSWER in record:
        return _conversation(_alpaca(record, where), where, record, reading)
    if isinstance(value, str) and name in (*_TALKS, *_IDS):
        value = _from_json(value, place)
    if isinstance(value, str):
        return Document(place, pieces(_plain(value, place)))
    if isinstance(value, list) and value and (name in _TALKS or isinstance(value[0], dict)):
        return _conversation(value, place, record, reading)
    if isinstance(value, list):
        return _from_ids(value, place, reading)
    if value is None:
        raise BadRecord(f"{place} is null: give it a text")
    raise BadRecord(f"{place} is neither text nor messages nor token ids: correct it")


def _wanted(reading: Reading) -> tuple[str, ...]:
    return (reading.field,) if reading.field else FIELDS


def _without(reading: Reading, said: str, names: Iterable[str]) -> str:
    *others, last = _wanted(reading)
    wanted = f"{', '.join(others)} or {last}" if others else last
    found = ", ".join(names) or "no fields"
    return f"{said} {wanted}, but {found}: name one with `field`"


def _from_json(value: str, place: str) -> Any:
    """Messages or token ids that a table states as text."""
    try:
        return parse(value)
    except ValueError as error:
        raise BadRecord(f"{place} is not JSON ({reason(error)}): correct it") from None


def _from_ids(values: list[Any], where: str, reading: Reading) -> Document:
    size = reading.vocab_size
    if not all(type(value) is int and 0 <= value < size for value in values):
        raise BadRecord(f"{where} is not a list of token ids from 0 to {size - 1}: correct it")
    return Document(where, ids=np.array(values, dtype=np.int64), is_closed=True)


# --- conversations ----------------------------------------------------------------------------


def _alpaca(record: dict[str, Any], where: str) -> list[Message]:
    """Question and answer; the input stands below the instruction."""
    asked, answer = record[_ALPACA], record[_ANSWER]
    about = record.get(_MATERIAL) or ""
    if not all(isinstance(text, str) for text in (asked, about, answer)):
        raise BadRecord(f"{where}: instruction, input and output must be texts: correct it")
    question = f"{asked}\n\n{about}" if about else asked
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _conversation(
    entries: list[Any], where: str, record: dict[str, Any], reading: Reading
) -> Document:
    messages = [_message(entry, where) for entry in entries]
    system = record.get(_SYSTEM)
    if system and messages[0]["role"] != "system":
        messages.insert(0, _message({"role": "system", "content": system}, where))
    if reading.render is None:
        raise SupraError(
            f"{where} is a conversation, but the model has no chat template: take a model made for "
            "chat, or give plain texts"
        )
    try:
        ids = reading.render(messages)
    except SupraError as error:
        raise BadRecord(f"{where}: {error}") from None
    calls = any("tool_calls" in message for message in messages)
    if calls and np.array_equal(ids, _without_calls(messages, reading.render)):
        raise BadRecord(f"{where}: the chat template has no place for tool calls: correct it")
    return Document(where, ids=ids, is_closed=True)


def _message(entry: Any, where: str) -> Message:
    """A message as templates know it, from a message or an entry of ShareGPT's."""
    # Tables have the keys of all messages in each, most of them null.
    message = {k: v for k, v in entry.items() if v is not None} if isinstance(entry, dict) else {}
    if "from" in message and "role" not in message:
        speaker = message.pop("from")
        role = _ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise BadRecord(f"{where} is from {speaker!r}, not {', '.join(_ROLES)}: correct it")
        message = {**message, "role": role, "content": message.pop("value", None)}
    content = _content(message.get("content"), where)
    has_content = isinstance(content, str) or (content is None and message.get("tool_calls"))
    if not isinstance(message.get("role"), str) or not has_content:
        raise BadRecord(f"{where} has a message without a text role and content: correct it")
    return {**message, "content": content}


def _content(content: Any, where: str) -> Any:
    """A message's text, which may come in parts."""
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
        if other := [kind for kind in kinds if kind != "text"]:
            raise BadRecord(f"{where} has a part of type {other[0]!r}, not 'text': omit it")
        texts = [part.get("text") for part in content]
        content = "\n".join(texts) if all(isinstance(text, str) for text in texts) else None
    return _plain(content, where) if isinstance(content, str) else content


def _without_calls(messages: list[Message], render: Render) -> npt.NDArray[np.int64]:
    """The conversation without its tool calls; empty where it cannot be rendered."""
    try:
        return render([{k: v for k, v in m.items() if k != "tool_calls"} for m in messages])
    except SupraError:
        return np.empty(0, dtype=np.int64)
