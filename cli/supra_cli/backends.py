"""Whether an optional package is there, and which backend a command uses by default."""

from __future__ import annotations

import importlib.util


def require(extra: str, purpose: str) -> None:
    """Raise :class:`MissingDependencyError` when the package of ``extra`` is not installed."""
    from supra_core.errors import MissingDependencyError

    if importlib.util.find_spec(extra) is None:
        raise MissingDependencyError(
            f"{purpose} needs {extra}: install it with pip install 'supra-lm[{extra}]'"
        )


def default_for_evaluation() -> str:
    """``torch`` where it is installed, else ``mlx``, else the reference."""
    for name in ("torch", "mlx"):
        if importlib.util.find_spec(name) is not None:
            return name
    return "reference"
