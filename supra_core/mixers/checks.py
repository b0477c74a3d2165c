"""How the classes of a spec check their fields."""

from __future__ import annotations

from pydantic import ConfigDict

from supra_core.errors import SpecError

# Python code may use a field's own name; files are read with by_name=False, by their names alone.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False, validate_by_name=True)

# No model reaches it: without a bound, a stranger's config could make its reader allocate.
LARGEST_SIZE = 2**31 - 1


def require(condition: bool, message: str) -> None:
    """Raise :class:`SpecError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise SpecError(message)


def require_window(window: int | None) -> None:
    """Check a window in tokens; None is none."""
    if window is not None:
        require(
            window >= 1, f"window must be at least 1 token, not {window}; leave it out for none"
        )
        require(window <= LARGEST_SIZE, f"window must be at most {LARGEST_SIZE}")


def require_original(length: int) -> None:
    """Check the length that a rope scaling starts from, in tokens."""
    require(
        0 < length <= LARGEST_SIZE,
        f"original_max_position_embeddings must be from 1 to {LARGEST_SIZE}",
    )
