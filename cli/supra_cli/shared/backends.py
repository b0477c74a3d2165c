"""Whether an optional package is there, and which backend a command uses by default."""

from __future__ import annotations

import importlib.util


def require(package: str, purpose: str, *, extra: str | None = None) -> None:
    """Raise :class:`MissingDependencyError` when a package is not installed.

    ``extra``: which of ours brings it; default: the one of the same name.
    """
    from supra_core.errors import MissingDependencyError

    if importlib.util.find_spec(package) is None:
        raise MissingDependencyError.of(package, purpose, extra or package)


def default_for_evaluation() -> str:
    """``torch`` where it is installed, else ``mlx``, else the reference."""
    from supra_core.runtime.backend import first_installed

    return first_installed("torch", "mlx") or "reference"
