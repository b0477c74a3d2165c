"""Checks a saved state and loads it into an engine.

The model's own states after one token and after three tell the names of the arrays, which extents
are fixed, and which grow with the text, in any backend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from supra_core.errors import FormatError
from supra_core.formats.finite import is_finite
from supra_core.model.spec import ModelSpec
from supra_core.progress import silent
from supra_core.runtime.backend import StateArrays
from supra_core.runtime.engine import Engine
from supra_core.runtime.state_file import SavedState

# Tokens of the two states that are compared.
_FEW, _MORE = 1, 3
# A window's cache may keep tokens that were fed together with its last ones.
_READ_TOGETHER = 2048


def restored(engine: Engine, saved: SavedState, path: Path, spec: ModelSpec | None = None) -> Any:
    """The engine's state from a file; FormatError unless this model could have made it.

    ``spec``: the model's, to check token ids, the lengths of windows, and integers that are
    positions.
    """
    try:
        _check(engine, saved, spec)
        state = engine.restored(saved.arrays)
        if saved.tokens:
            # A step on a copy shows whether the arrays fit together.
            engine.feed([0], engine.copy(state), silent)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    except (KeyError, ValueError, IndexError, TypeError, RuntimeError, OverflowError) as error:
        raise _misfit(path, error) from None
    return state


def _misfit(path: Path, error: Exception) -> FormatError:
    return FormatError(f"{path}: the state does not fit the model ({error}): save the state again")


def _check(engine: Engine, saved: SavedState, spec: ModelSpec | None) -> None:
    count = len(saved.tokens)
    most = 2**31 if spec is None else spec.vocab_size
    if any(not 0 <= token < most for token in saved.tokens):
        raise FormatError("a token id is outside the model's vocabulary: save the state again")
    few, more = (_arrays(engine, tokens if count else 0) for tokens in (_FEW, _MORE))
    if saved.arrays.keys() != few.keys():
        name = min(saved.arrays.keys() ^ few.keys())
        said = "lacks" if name in few else "has"
        raise FormatError(
            f"the state {said} the array {name}, unlike the model's: save the state again"
        )
    # By layer: its length so far, which all of its arrays share.
    grown: dict[str, int] = {}
    for name, array in saved.arrays.items():
        if not _is_alike(array, few[name], more[name], _reach(name, count, spec), name, grown):
            raise FormatError(
                f"array {name} is {array.dtype} {list(array.shape)}, which this model does "
                f"not have after {count:,} tokens: save the state again"
            )
        if not is_finite(array):
            raise FormatError(f"array {name} holds NaN or infinity: save the state again")
        counts = spec is not None and array.dtype.kind in "iu"
        if counts and not _counts(name, array, few[name], more[name], count):
            raise FormatError(
                f"array {name} holds numbers that {count:,} tokens cannot give: save the state "
                "again"
            )


def _arrays(engine: Engine, tokens: int) -> StateArrays:
    state = engine.fresh()
    if tokens:
        engine.feed([0] * tokens, state, silent)
    return engine.arrays(state)


def _layer(name: str) -> str:
    """The number of an array's layer, as all backends name them: it stands before the last."""
    return name.split(".")[-2] if "." in name else ""


def _reach(name: str, count: int, spec: ModelSpec | None) -> tuple[int, int]:
    """The least and the greatest length of a layer's arrays after ``count`` tokens."""
    layer, window = _layer(name), None
    if spec is not None and layer.isdecimal() and int(layer) < spec.num_hidden_layers:
        mixer = spec.layers[int(layer)].mixer
        window = mixer.fills_at or mixer.window
    if window is None:
        return count, count
    return min(count, window - 1), max(window, min(count, window + _READ_TOGETHER))


def _is_alike(
    array: npt.NDArray[Any],
    few: npt.NDArray[Any],
    more: npt.NDArray[Any],
    reach: tuple[int, int],
    name: str,
    grown: dict[str, int],
) -> bool:
    """Whether type, axes and extents are the model's; what has grown is noted in ``grown``."""
    if array.dtype != few.dtype or not array.ndim == few.ndim == more.ndim:
        return False
    for extent, first, later in zip(array.shape, few.shape, more.shape, strict=True):
        if first == later:
            if extent != first:
                return False
        elif not reach[0] <= extent <= reach[1] or grown.setdefault(_layer(name), extent) != extent:
            return False
    return True


def _counts(
    name: str,
    array: npt.NDArray[Any],
    few: npt.NDArray[Any],
    more: npt.NDArray[Any],
    count: int,
) -> bool:
    """Whether integers may be counts of tokens or positions among them."""
    if array.size and not (array.min() >= 0 and array.max() <= max(count, int(few.max()))):
        return False
    if few.shape != more.shape:
        return True
    same, counted = few == more, (few == _FEW) & (more == _MORE)
    exact = name.rpartition(".")[2] == "tokens"
    return bool(
        np.all(array[same] == few[same]) and not (exact and np.any(array[counted] != count))
    )
