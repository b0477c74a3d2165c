"""What a backend offers, and how one is chosen."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from supra_core.errors import MissingDependencyError, SupraError
from supra_core.spec import ModelSpec

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


_MODULES = {
    "reference": ("supra_core.reference_backend", "numpy"),
    "torch": ("supra_torch.backend", "torch"),
    "mlx": ("supra_mlx.backend", "mlx"),
    "transformers": ("supra_torch.transformers_backend", "transformers"),
    "mlx-lm": ("supra_mlx.stock_backend", "mlx_lm"),
}
BACKENDS = tuple(_MODULES)


def load(name: str, path: str | Path, *, dtype: str | None = None) -> Backend:
    """The model at ``path`` in the backend called ``name``.

    ``dtype``: the type to compute in; None keeps the weights' own. Raises
    :class:`MissingDependencyError` when the backend's package is not installed.
    """
    check_name(name)
    module, package = _MODULES[name]
    if importlib.util.find_spec(package) is None:
        extra = "mlx" if name.startswith("mlx") else "torch"
        raise MissingDependencyError(
            f"the {name} backend needs {package}: install it with pip install 'supra-lm[{extra}]'"
        )
    backend: Backend = importlib.import_module(module).load(Path(path), dtype=dtype)
    return backend


def check_name(name: str) -> None:
    """Raise :class:`SupraError` unless there is a backend of that name."""
    if name not in _MODULES:
        raise SupraError(f"unknown backend '{name}': use one of {', '.join(BACKENDS)}")


def default_for_generation() -> str:
    """``mlx`` where it is installed, else ``torch``."""
    for name in ("mlx", "torch"):
        if importlib.util.find_spec(name) is not None:
            return name
    raise MissingDependencyError(
        "generation needs a backend: install one with pip install 'supra-lm[mlx]' or "
        "'supra-lm[torch]'"
    )
