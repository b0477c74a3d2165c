"""A conversation in a file: the state, the tokens it has seen, and the transcript.

Safetensors: ``tokens`` (n,) int64, the state's arrays as ``state.NAME``, and in the metadata
``format`` (supra-state-2), ``model`` (its fingerprint), ``source``, ``backend``, ``dtype``,
``messages`` (JSON), ``began`` (ISO 8601) and ``sha256`` over all of it. A file of supra-state-1
has no ``began``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np

from supra_core.errors import FormatError, SupraError
from supra_core.formats.atomic import atomic_file, check_new_file
from supra_core.formats.jsonfile import parse
from supra_core.formats.safetensors import metadata as read_metadata
from supra_core.formats.safetensors import read_file, write_file
from supra_core.runtime.backend import StateArrays
from supra_core.runtime.engine import Message
from supra_core.tensors import LazyTensor

# By version, the fields of the metadata that ``sha256`` is over.
_FIELDS_1 = ("model", "source", "backend", "dtype", "messages")
FORMATS = {"supra-state-1": _FIELDS_1, "supra-state-2": (*_FIELDS_1, "began")}
_PREFIX = "state."
# Characters of a question that stand for its conversation.
_QUOTED = 60


@dataclass(frozen=True)
class Owner:
    """Whose state it is: the model's fingerprint and where it was, backend and type of numbers."""

    model: str
    source: str
    backend: str
    dtype: str


@dataclass(frozen=True)
class SavedState:
    """What a file holds; ``began``: the time that the chat template was told, None: not known."""

    owner: Owner
    messages: tuple[Message, ...]
    tokens: tuple[int, ...]
    arrays: StateArrays
    began: datetime | None = None

    @property
    def state_bytes(self) -> int:
        """The state alone."""
        return sum(array.nbytes for array in self.arrays.values())


def write_state(path: str | Path, state: SavedState, *, force: bool = False) -> None:
    """Write the file whole or not at all; raises as :func:`check_new_state`."""
    check_new_state(path, force)
    arrays = {"tokens": np.array(state.tokens, dtype=np.int64)}
    arrays |= {_PREFIX + name: np.array(a, order="C") for name, a in state.arrays.items()}
    metadata = {
        "model": state.owner.model,
        "source": state.owner.source,
        "backend": state.owner.backend,
        "dtype": state.owner.dtype,
        "messages": json.dumps(state.messages, ensure_ascii=False),
    }
    version = "supra-state-1"
    if state.began is not None:
        version, metadata["began"] = "supra-state-2", state.began.isoformat()
    metadata = {"format": version, **metadata, "sha256": _digest(metadata, arrays)}
    with atomic_file(path, replace=force) as beside:
        write_file(beside, {name: LazyTensor.of(a) for name, a in arrays.items()}, metadata)


def check_new_state(path: str | Path, force: bool) -> None:
    """Raise SupraError where :func:`write_state` would: a state that is there is named.

    ``force``: it may be replaced, as long as it is a state.
    """
    place = Path(path)
    if os.path.isfile(place):
        whose = _whose(place)
        if whose is None and force:
            raise SupraError(
                f"{path} is no saved state, so it is not replaced even by force: name another file"
            )
        if whose is not None and not force:
            raise SupraError(
                f"{path} exists and holds {whose}: name another place, or replace it with `force`"
            )
    check_new_file(path, force)


def _whose(path: Path) -> str | None:
    """Which conversation a file holds, for whoever is about to replace it; None for no state."""
    try:
        stated = _metadata(path)
    except FormatError:
        return None
    if stated.get("format") not in FORMATS:
        return None
    model = stated.get("source", "another model")
    try:
        messages = parse(stated.get("messages", ""))
    except ValueError:
        messages = None
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        return f"a state of {model}"
    asked = [message["content"] for message in messages if message["role"] == "user"]
    if not asked:
        return f"a conversation with {model} (no question yet)"
    last = asked[-1] if len(asked[-1]) <= _QUOTED else asked[-1][:_QUOTED] + "..."
    turns = "1 turn" if len(asked) == 1 else f"{len(asked):,} turns"
    return f"a conversation with {model} ({turns}, the last question: {last})"


def read_state(path: str | Path) -> SavedState:
    """The file's content; FormatError when it is no state, truncated, or not as it was written."""
    path = Path(path)
    metadata = _metadata(path)
    fields = FORMATS.get(metadata.get("format", ""), ())
    if not fields or not all(field in metadata for field in (*fields, "sha256")):
        raise FormatError(
            f"{path} is no saved state: name a file that /save or supra state read wrote"
        )
    arrays = {name: np.array(tensor.read()) for name, tensor in read_file(path).items()}
    stated = {field: metadata[field] for field in fields}
    if _digest(stated, arrays) != metadata["sha256"] or "tokens" not in arrays:
        raise FormatError(f"{path} is not as it was written: save the state again")
    tokens = arrays["tokens"]
    if tokens.ndim != 1 or tokens.dtype != np.int64:
        raise FormatError(f"{path}: tensor tokens is no list of token ids: save the state again")
    try:
        messages = parse(metadata["messages"])
    except ValueError:
        messages = None
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        raise FormatError(f"{path}: field messages is no transcript: save the state again")
    return SavedState(
        Owner(*(metadata[field] for field in ("model", "source", "backend", "dtype"))),
        tuple(messages),
        tuple(tokens.tolist()),
        {name.removeprefix(_PREFIX): a for name, a in arrays.items() if name != "tokens"},
        _time(path, stated["began"]) if "began" in stated else None,
    )


def check_owner(path: str | Path, found: Owner, wanted: Owner) -> None:
    """Raise SupraError when the state of a file is not one that ``wanted`` can go on from."""
    if found.model != wanted.model:
        raise SupraError(
            f"{path} is the state of another model ({found.source}): open it with that one"
        )
    if found.backend != wanted.backend:
        raise SupraError(
            f"{path} was saved by the backend {found.backend}: give `backend={found.backend}`"
        )
    if found.dtype != wanted.dtype:
        raise SupraError(f"{path} was computed in {found.dtype}: give `dtype={found.dtype}`")


def _metadata(path: Path) -> dict[str, str]:
    if os.path.isdir(path):
        raise FormatError(f"{path} is a folder: name a file that /save or supra state read wrote")
    if not os.path.lexists(path):
        raise FormatError(f"{path} does not exist: check the path")
    try:
        return read_metadata(path)
    except FormatError as error:
        raise FormatError(
            f"{path} is no saved state, or a truncated one: save the state again"
        ) from error


def _time(path: Path, text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise FormatError(f"{path}: field began is no time: save the state again") from None


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and all(isinstance(text, str) for text in value.values())
    )


def _digest(metadata: Mapping[str, str], arrays: StateArrays) -> str:
    digest = hashlib.sha256()
    digest.update(json.dumps(metadata, sort_keys=True, ensure_ascii=False).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.shape} {array.dtype}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
