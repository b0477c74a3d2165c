"""A saved state is gone on with only where the model itself could have made it, in any backend."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from supra_core.errors import FormatError
from supra_core.model.spec import ModelSpec
from supra_core.progress import silent
from supra_core.runtime.backend_engine import BackendEngine
from supra_core.runtime.engine import Engine
from supra_core.runtime.reference_backend import ReferenceBackend
from supra_core.runtime.resumption import restored
from supra_core.runtime.state_file import Owner, SavedState
from tests.tiny_models import SPECS, lazy_weights, reference

PATH = Path("talk.safetensors")


def _reference(spec: ModelSpec) -> Engine:
    return BackendEngine(ReferenceBackend(reference(spec)), None)


def _torch(spec: ModelSpec) -> Engine:
    torch = pytest.importorskip("torch")
    backend = importlib.import_module("supra_torch.inference.backend")
    model = importlib.import_module("supra_torch.model.model").build(spec, lazy_weights(spec))
    return BackendEngine(backend.TorchBackend(model, torch.device("cpu")), None)


def _mlx_backend(spec: ModelSpec) -> Engine:
    pytest.importorskip("mlx.core")
    from tests.mlx.models import mlx_backend

    return BackendEngine(mlx_backend(spec), None)


def _mlx(spec: ModelSpec) -> Engine:
    pytest.importorskip("mlx.core")
    from supra_mlx.engine import MLXEngine
    from tests.mlx.models import mlx_backend

    return MLXEngine(mlx_backend(spec).model, SimpleNamespace())


ENGINES: dict[str, Callable[[ModelSpec], Engine]] = {
    "reference": _reference, "torch": _torch, "mlx": _mlx, "mlx backend": _mlx_backend,
}  # fmt: skip


def _saved(engine: Engine, spec: ModelSpec, count: int) -> SavedState:
    ids = [int(i) for i in np.random.default_rng(0).integers(0, spec.vocab_size, count)]
    state = engine.fresh()
    engine.feed(ids[: count // 2], state, silent)
    # As an answer is spoken: a token at a time.
    for token in ids[count // 2 :]:
        engine.feed([token], state, silent)
    owner = Owner("abc", "model", engine.backend, "float32")
    return SavedState(owner, (), tuple(ids), dict(engine.arrays(state)))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("backend", ENGINES)
def test_what_the_model_saved_is_gone_on_with(backend: str, name: str) -> None:
    spec = SPECS[name]
    engine = ENGINES[backend](spec)
    for count in (0, 1, 2, 30):
        saved = _saved(engine, spec, count)
        state = restored(engine, saved, PATH, spec)
        again = engine.arrays(state)
        assert again.keys() == saved.arrays.keys()
        for array_name, array in saved.arrays.items():
            np.testing.assert_array_equal(again[array_name], array)


def _forgeries(arrays: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each array in every shape and type that it may not have, and without one, and one more."""
    forged: dict[str, dict[str, Any]] = {
        "none": {},
        "another": {**arrays, "layers.0.other": np.zeros(3)},
        "no number": {**arrays, "x.y.z": np.zeros(3)},
    }
    for name, array in arrays.items():
        others = {
            "float16": array.astype(np.float16), "int8": array.astype(np.int8),
            "flat": array.reshape(-1) if array.ndim != 1 else array[None],
            "deeper": array[None], "of one": np.zeros((1,) * (array.ndim + 1), array.dtype),
            "empty": array.reshape(-1)[:0], "large": np.full_like(array, 1e9),
        }  # fmt: skip
        if array.dtype.kind != "b":
            others["negative"] = array - np.array(10, array.dtype)
        if array.dtype.kind == "f":
            others["NaN"] = np.full_like(array, np.nan)
            del others["large"], others["negative"]
        if array.dtype.kind == "b":
            del others["large"]
        for axis in range(array.ndim):
            others[f"longer {axis}"] = np.repeat(array, 2, axis)
            others[f"cut {axis}"] = np.take(array, range(array.shape[axis] - 1), axis)
        forged |= {f"{name} {what}": {**arrays, name: other} for what, other in others.items()}
        forged[f"without {name}"] = {n: a for n, a in arrays.items() if n != name}
    return forged


@pytest.mark.parametrize("name", ["hybrid", "transformer", "paper", "experts"])
@pytest.mark.parametrize("backend", ENGINES)
def test_what_it_could_not_have_made_is_refused(backend: str, name: str) -> None:
    spec = SPECS[name]
    engine = ENGINES[backend](spec)
    saved = _saved(engine, spec, 9)
    for what, arrays in _forgeries(dict(saved.arrays)).items():
        said = ""
        with contextlib.suppress(FormatError):
            restored(engine, replace(saved, arrays=arrays), PATH, spec)
            said = what
        assert not said
    for token in (-1, spec.vocab_size, 2**40):
        with pytest.raises(FormatError, match="a token id is outside the model's vocabulary"):
            restored(engine, replace(saved, tokens=(*saved.tokens[:-1], token)), PATH, spec)
    for tokens in ((), saved.tokens[:4]):
        with pytest.raises(FormatError):
            restored(engine, replace(saved, tokens=tokens), PATH, spec)
