"""Saved states whose arrays, tokens or owner are others: what a model could have made, or not."""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Backend
from supra_core.runtime.backend_engine import BackendEngine, Held
from supra_core.runtime.reference_backend import ReferenceBackend
from supra_core.runtime.resumption import restored
from supra_core.runtime.state_file import Owner, _digest, check_owner, read_state
from tests.fuzz.harness import Files, Format
from tests.fuzz.mutations import EXTREMES, Seeded, changed_bytes, changed_value
from tests.tiny_models import SPECS, lazy_weights, reference

# Caches that grow, windows, states, and all of them.
_SPECS = ("transformer", "sliding", "paper", "windowed", "hybrid")
_BACKENDS = ("reference", "torch") if importlib.util.find_spec("torch") else ("reference",)
_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32",
    "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_NUMBERS = (0.0, -1.0, 1.0, 3.0, 1e308, float("nan"), float("inf"), -1e-320)
_State = tuple[dict[str, str], dict[str, np.ndarray]]


class _Remembering(BackendEngine):
    """What a text's first tokens leave is computed once: every check compares with it."""

    def __init__(self, model: Backend) -> None:
        super().__init__(model, None)  # type: ignore[arg-type]
        self._begun: dict[tuple[int, ...], Any] = {}

    def feed(self, ids: Sequence[int], state: Held, progress: Progress = silent) -> None:
        if state.state is not None:
            super().feed(ids, state, progress)
            return
        if tuple(ids) not in self._begun:
            super().feed(ids, state, progress)
            self._begun[tuple(ids)] = state.state
        state.state = self._begun[tuple(ids)]


@cache
def _engine(backend: str, name: str) -> BackendEngine:
    spec = SPECS[name]
    if backend == "reference":
        return _Remembering(ReferenceBackend(reference(spec)))
    torch: Any = importlib.import_module("torch")
    model = importlib.import_module("supra_torch.model.model").build(spec, lazy_weights(spec))
    made = importlib.import_module("supra_torch.inference.backend").TorchBackend(
        model, torch.device("cpu")
    )
    return _Remembering(made)


@cache
def _saved(backend: str, name: str, count: int) -> _State:
    """A state's metadata and arrays after ``count`` tokens."""
    engine, ids = _engine(backend, name), [token % 50 for token in range(count)]
    held = engine.fresh()
    engine.feed(ids, held, silent)
    stated = {
        "model": "m", "source": name, "backend": backend, "dtype": "float32",
        "messages": json.dumps([{"role": "user", "content": "hi"}]), "began": "2024-07-26T23:59:00",
    }  # fmt: skip
    arrays = {f"state.{name}": np.array(array) for name, array in engine.arrays(held).items()}
    return stated, {"tokens": np.array(ids, np.int64), **arrays}


def _packed(stated: dict[str, str], arrays: dict[str, np.ndarray]) -> bytes:
    header: dict[str, Any] = {
        "__metadata__": {"format": "supra-state-2", **stated, "sha256": _digest(stated, arrays)}
    }
    at = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _CODES[str(array.dtype)], "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }  # fmt: skip
        at += array.nbytes
    text = json.dumps(header).encode()
    data = b"".join(array.tobytes() for array in arrays.values())
    return len(text).to_bytes(8, "little") + text + data


def _other(chance: Seeded, array: np.ndarray) -> np.ndarray:
    """The array in another form, or with another number in it."""
    kind = chance.number(0, 5)
    if kind == 0:
        with np.errstate(all="ignore"):
            return array.astype(chance.one(tuple(_CODES)))
    if kind == 1:
        return np.zeros([chance.number(0, 9) for _ in range(chance.number(0, 5))], array.dtype)
    if kind == 2 and array.ndim:
        axis = chance.number(0, array.ndim - 1)
        return np.repeat(array, chance.number(0, 3), axis)
    if kind == 3 and array.ndim:
        axis = chance.number(0, array.ndim - 1)
        return np.take(array, range(array.shape[axis] - 1), axis)
    if kind == 4:
        return array[None] if chance.number(0, 1) else array.reshape(-1)
    array = array.copy()
    if array.size:
        number = chance.one(EXTREMES if array.dtype.kind in "iu" else _NUMBERS)
        place = chance.number(0, array.size - 1)
        with np.errstate(all="ignore"):
            array.reshape(-1)[place : place + 1] = np.array([number]).astype(array.dtype)
    return array


def _drawn(random: Random) -> tuple[Files, str]:
    chance = Seeded(random)
    known = chance.one(_BACKENDS), chance.one(_SPECS)
    stated, arrays = (dict(part) for part in _saved(*known, chance.one((0, 1, 2, 9, 30))))
    for _ in range(chance.number(0, 3)):
        name = chance.one(sorted(arrays))
        kind = chance.number(0, 9)
        if kind == 0 and name != "tokens":
            del arrays[name]
        elif kind == 1:
            parts = name.split(".")
            parts[chance.number(0, len(parts) - 1)] = chance.one(("0", "1", "-1", "99", "", "x"))
            arrays[".".join(parts)] = arrays.pop(name) if name != "tokens" else arrays[name]
        elif kind == 2:
            arrays[name] = arrays[chance.one(sorted(arrays))]
        elif kind == 3:
            # Of the same model after another number of tokens.
            arrays |= dict([chance.one(sorted(_saved(*known, chance.one((1, 9, 30)))[1].items()))])
        else:
            arrays[name] = _other(chance, arrays[name])
    if chance.number(0, 9) == 0:
        messages = changed_value(chance, {"m": json.loads(stated["messages"])})
        stated["messages"] = json.dumps(messages.get("m"))
    if chance.number(0, 9) == 0:
        field = chance.one(sorted(stated))
        stated[field] = chance.text(20).encode("utf-8", "replace").decode()
    content = _packed(stated, arrays)
    if chance.number(0, 19) == 0:
        content = changed_bytes(chance, content)
    return {"state": content}, "state"


def _read(path: Path) -> object:
    """As ``supra chat --state`` goes on from a file."""
    saved = read_state(path)
    backend, name = saved.owner.backend, saved.owner.source
    if backend not in _BACKENDS or name not in _SPECS:
        return saved
    check_owner(path, saved.owner, Owner("m", name, backend, "float32"))
    engine, spec = _engine(backend, name), SPECS[name]
    state = restored(engine, saved, path, spec)
    # What was taken is gone on from: by a token, and by some together.
    engine.feed([1], engine.copy(state), silent)
    engine.feed([2, 3, 4], state, silent)
    return engine.arrays(state)


FORMATS = (Format.seeded("resumed", _drawn, _read),)
