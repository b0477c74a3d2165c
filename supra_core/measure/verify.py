"""The same tokens through two models or backends, and how far their logits are apart."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from supra_core.errors import FormatError, SupraError
from supra_core.formats.atomic import atomic_file, check_new_file
from supra_core.progress import Progress, silent
from supra_core.runtime import backend as backends
from supra_core.runtime.backend import Form, Ids, Logits, check_ids
from supra_core.sources.source import open_source

DEFAULT_LENGTH = 128

# By default the logits of two right implementations may differ by this share of the largest one, by
# the type that is computed in. Single tokens of real models drive activations to a thousand times
# the others', and their rounding with them.
_SHARES = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}


@dataclass(frozen=True)
class Candidate:
    """One way to compute logits: a model in a backend, by one of its forms."""

    label: str
    backend: str
    path: Path
    form: Form

    @property
    def file(self) -> str:
        """What its logits are saved as."""
        return f"{self.label}.npy"


@dataclass(frozen=True)
class Difference:
    """Two logits (B, T, V) compared.

    ``max_abs_difference`` in logits; ``mean_kl`` is KL(first || other) in nats, the mean over
    positions; ``top1_agreement`` the share of positions whose likeliest token is the same.
    """

    max_abs_difference: float
    mean_kl: float
    top1_agreement: float


@dataclass(frozen=True)
class Comparison:
    """A candidate against the first one."""

    candidate: Candidate
    difference: Difference
    within_tolerance: bool


@dataclass(frozen=True)
class Report:
    """All comparisons; with a single candidate there are none, and it passes.

    ``tolerance``: by how much logits may differ.
    """

    first: Candidate
    comparisons: tuple[Comparison, ...]
    tolerance: float
    batch: int
    tokens: int

    @property
    def passed(self) -> bool:
        return all(comparison.within_tolerance for comparison in self.comparisons)


def candidates(
    path: Path, other: Path | None, names: Sequence[str], form: Form
) -> tuple[Candidate, ...]:
    """What to compare, the first with all others.

    Several backends run ``path`` each; with ``other``, the first backend runs ``path`` and the
    rest run ``other``. One backend runs both models, or, without ``other``, its own parallel
    form and the one asked for.
    """
    if not names:
        raise SupraError("name at least one `backend`")
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise SupraError(f"backend {repeated[0]} is named twice: name each backend once")
    name, *more = names
    first = Candidate(name, name, path, form)
    if more:
        return (first, *(Candidate(name, name, other or path, form) for name in more))
    if other is not None:
        return first, Candidate(f"{name}-second", name, other, form)
    if form != "parallel":
        return Candidate(f"{name}-parallel", name, path, "parallel"), first
    return (first,)


def random_ids(vocab_size: int, length: int = DEFAULT_LENGTH, seed: int = 0) -> Ids:
    """A fixed random sequence, (1, length): the same on every machine."""
    return np.random.default_rng(seed).integers(vocab_size, size=(1, length))


def read_ids(path: Path) -> Ids:
    """Token ids (B, T) from a ``.npy`` file of integers, (T,) or (B, T)."""
    try:
        ids = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read as a .npy file of token ids: {error}") from None
    if not isinstance(ids, np.ndarray) or not np.issubdtype(ids.dtype, np.integer):
        raise FormatError(f"{path} holds no integers: save token ids with numpy.save")
    if ids.ndim not in (1, 2) or not ids.size:
        raise FormatError(
            f"{path} has shape {list(ids.shape)}: token ids are (T,) or (B, T) and not empty"
        )
    return np.atleast_2d(ids).astype(np.int64)


def verify(
    chosen: Sequence[Candidate],
    ids: Ids,
    *,
    tolerance: float | None = None,
    dtype: str | None = None,
    save_logits: Path | None = None,
    progress: Progress = silent,
) -> Report:
    """Run ids (B, T) through every candidate, one model in memory at a time.

    ``tolerance``: by how much logits may differ; None: as the largest logit and the type computed
    in have it. ``save_logits``: a folder that gets LABEL.npy, float32 (B, T, V), for each of them.
    Raises SupraError before a model is loaded for a backend that is not installed, or no such
    folder.
    """
    _check_request(chosen, tolerance, save_logits)
    first: Logits | None = None
    comparisons = []
    for done, candidate in enumerate(chosen):
        progress(f"verify: {candidate.label}", done, len(chosen))
        logits = _logits(candidate, ids, dtype)
        if save_logits is not None:
            with atomic_file(save_logits / candidate.file) as partial, open(partial, "wb") as file:
                np.save(file, logits)
        if first is None:
            first = logits
            if tolerance is None:
                tolerance = _default_tolerance(chosen, first, dtype)
            continue
        assert tolerance is not None
        difference = compare(first, logits)
        # NaN is not within any tolerance.
        within = difference.max_abs_difference <= tolerance
        comparisons.append(Comparison(candidate, difference, within))
    progress("verify", len(chosen), len(chosen))
    B, T = ids.shape
    return Report(chosen[0], tuple(comparisons), tolerance or 0.0, B, T)


def _default_tolerance(chosen: Sequence[Candidate], first: Logits, dtype: str | None) -> float:
    """The share of the coarsest type that any candidate computes in, of the first's logits."""
    places = {candidate.path for candidate in chosen}
    types = {dtype} if dtype is not None else {open_source(place).dtype for place in places}
    return max(_SHARES[name] for name in types) * float(np.abs(first).max())


def _check_request(chosen: Sequence[Candidate], tolerance: float | None, save: Path | None) -> None:
    for candidate in chosen:
        backends.check_installed(candidate.backend)
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise SupraError(f"`tolerance` must be a number that is at least 0, not {tolerance}")
    if len(chosen) < 2 and save is None:
        raise SupraError(
            "there is nothing to compare: name a second `backend`, a second model, "
            "another `form`, or a folder for `save_logits`"
        )
    if save is None:
        return
    if os.path.isfile(save):
        raise SupraError(f"{save} is a file: name a folder for `save_logits`")
    for candidate in chosen:
        check_new_file(save / candidate.file, force=True)


def compare(first: Logits, other: Logits) -> Difference:
    """How far ``other`` is from ``first``, both (B, T, V)."""
    if first.shape != other.shape:
        raise SupraError(
            f"logits of shapes {list(first.shape)} and {list(other.shape)} cannot be compared: "
            "the two models have different vocabularies"
        )
    largest, divergence, agreed = 0.0, 0.0, 0
    rows_first, rows_other = (x.reshape(-1, x.shape[-1]) for x in (first, other))
    # Row by row: float64 copies of the whole would be several times the logits.
    for a, b in zip(rows_first, rows_other, strict=True):
        p, q = _log_softmax(a.astype(np.float64)), _log_softmax(b.astype(np.float64))
        # np.maximum, because Python's max would drop a NaN.
        largest = float(np.maximum(largest, np.abs(a.astype(np.float64) - b).max()))
        divergence += float(np.sum(np.exp(p) * (p - q)))
        # NaN has no likeliest token.
        agreed += int(a.argmax() == b.argmax() and not np.isnan(a + b).any())
    positions = len(rows_first)
    return Difference(largest, divergence / positions, agreed / positions)


def _logits(candidate: Candidate, ids: Ids, dtype: str | None) -> Logits:
    model = backends.load(candidate.backend, candidate.path, dtype=dtype)
    check_ids(ids, model.spec.vocab_size)
    return model.logits(ids, form=candidate.form)


def _log_softmax(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = z - z.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))
