"""What a backend offers, and how one is chosen."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from supra_core.errors import MissingDependencyError, SupraError, install
from supra_core.model.spec import ModelSpec

Form = Literal["parallel", "recurrent", "step"]
Ids = npt.NDArray[np.integer[Any]]
Mask = npt.NDArray[np.bool_]
Logits = npt.NDArray[np.float32]
StateArrays = dict[str, npt.NDArray[Any]]


class Backend(Protocol):
    """A loaded model. States are opaque to the caller and never changed in place.

    ids: (B, T) token ids; mask: (B, T) bool, False for padding, whose logits mean nothing.
    """

    name: str
    spec: ModelSpec

    def logits(self, ids: Ids, *, mask: Mask | None = None, form: Form = "parallel") -> Logits:
        """Logits (B, T, V), float32, by the named form."""
        ...

    def prefill(
        self, ids: Ids, state: Any = None, *, mask: Mask | None = None
    ) -> tuple[Logits, Any]:
        """Logits (B, T, V) and the state after ids, going on from ``state``."""
        ...

    def step(self, ids: Ids, state: Any) -> tuple[Logits, Any]:
        """Logits (B, V) and the state after one more token each, ids (B,)."""
        ...

    def state_arrays(self, state: Any) -> StateArrays:
        """The state as named arrays, for a file."""
        ...

    def state_from_arrays(self, arrays: StateArrays) -> Any:
        """The inverse of :meth:`state_arrays`."""
        ...


# A backend's module, and the packages that it stands on.
_MODULES = {
    "reference": ("supra_core.runtime.reference_backend", ("numpy",)),
    "torch": ("supra_torch.inference.backend", ("torch",)),
    "mlx": ("supra_mlx.backend", ("mlx", "mlx_lm")),
    "transformers": ("supra_torch.inference.transformers_backend", ("torch", "transformers")),
    "mlx-lm": ("supra_mlx.stock_backend", ("mlx", "mlx_lm")),
}
BACKENDS = tuple(_MODULES)


def load(name: str, path: str | Path, *, dtype: str | None = None) -> Backend:
    """The model at ``path`` in the backend called ``name``.

    ``dtype``: the type to compute in; None keeps the weights' own. Raises
    :class:`MissingDependencyError` when a package of the backend is not installed or broken.
    """
    with importing(name):
        module = importlib.import_module(_MODULES[name][0])
    backend: Backend = module.load(Path(path), dtype=dtype)
    return backend


def is_installed(name: str) -> bool:
    """Whether the backend's packages are all there; none is imported, so they may be broken."""
    return not _absent(name)


def first_installed(*names: str) -> str | None:
    """The first of these backends whose packages are all there."""
    return next(filter(is_installed, names), None)


def check_installed(name: str, purpose: str | None = None) -> None:
    """Raise :class:`MissingDependencyError` for a package of the backend that is not there.

    ``purpose``: what needs it; default: the backend.
    """
    check_name(name)
    if absent := _absent(name):
        raise MissingDependencyError.of(absent[0], purpose or f"the {name} backend", _extra(name))


@contextmanager
def importing(name: str, purpose: str | None = None) -> Iterator[None]:
    """Around imports from the backend's packages: one that is missing or broken is a
    :class:`MissingDependencyError` with the remedy, as of :func:`check_installed`.
    """
    check_installed(name, purpose)
    try:
        yield
    except ImportError as error:
        # As of mlx without the library that computes, which on Linux is a package of its own.
        raise MissingDependencyError(
            f"{purpose or f'the {name} backend'} cannot import what it needs ({error}): install it "
            f"with {install(_extra(name))}"
        ) from error


def check_name(name: str) -> None:
    """Raise :class:`SupraError` unless there is a backend of that name."""
    if name not in _MODULES:
        raise SupraError(f"unknown backend '{name}': use one of {', '.join(BACKENDS)}")


def default_for_generation() -> str:
    """``mlx`` where it is installed, else ``torch``."""
    found = first_installed("mlx", "torch")
    if found is None:
        raise MissingDependencyError(
            "generation needs a backend: install one with pip install 'supra-lm[mlx]' or "
            "'supra-lm[torch]'"
        )
    return found


def check_ids(ids: Ids, vocab_size: int) -> None:
    """Raise :class:`SupraError` for an id that the vocabulary does not have."""
    if ids.min() < 0 or ids.max() >= vocab_size:
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise SupraError(
            f"token id {wrong} is outside the model's vocabulary of {vocab_size}: "
            "use ids of this model's tokenizer"
        )


def _absent(name: str) -> list[str]:
    return [package for package in _MODULES[name][1] if importlib.util.find_spec(package) is None]


def _extra(name: str) -> str:
    return "mlx" if name.startswith("mlx") else "torch"
