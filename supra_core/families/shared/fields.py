"""Reading a config's fields, with errors that name the file and the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from supra_core.errors import SpecError
from supra_core.mixers.checks import LARGEST_SIZE
from supra_core.model.spec import MOST_LAYERS


class Fields:
    """A config with typed access; every complaint is one :class:`SpecError` sentence."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def error(self, message: str) -> SpecError:
        """An error about this config, to be raised by the caller."""
        return SpecError(f"{self.where}: {message}")

    def located(self, error: SpecError) -> SpecError:
        """The same error, which names this config's file."""
        return error if str(error).startswith(self.where) else self.error(str(error))

    def has(self, *names: str) -> bool:
        """Whether any of the names is stated and not null."""
        return any(self.values.get(name) is not None for name in names)

    def stated(self, name: str, *, by_default: bool) -> bool:
        """Whether a field that may be null has a value; ``by_default``: whether absent ones do."""
        return self.has(name) or (by_default and name not in self.values)

    def integer(self, *names: str, default: int | None = None) -> int:
        """The first of ``names`` that is stated, a positive integer."""
        return self._integer(names, default, 1, "a positive integer")

    def whole(self, name: str, *, default: int) -> int:
        """An integer that is at least 0."""
        return self._integer((name,), default, 0, "an integer of at least 0")

    def number(self, *names: str, default: float | None = None) -> float:
        """The first of ``names`` that is stated, a positive number."""
        value = self._stated(names, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(f"field {self._name(names)} must be a positive number, not {value!r}")
        # An integer may be too large for a float, and JSON's 1e999 is infinite.
        if value > 1e300 or not math.isfinite(value):
            raise self.error(f"field {self._name(names)} must be a finite number")
        return float(value)

    def flag(self, *names: str, default: bool | None = None) -> bool:
        """The first of ``names`` that is stated, true or false."""
        value = self._stated(names, default)
        if not isinstance(value, bool):
            raise self.error(f"field {self._name(names)} must be true or false, not {value!r}")
        return value

    def text(self, *names: str, default: str | None = None) -> str:
        """The first of ``names`` that is stated, a string."""
        value = self._stated(names, default)
        if not isinstance(value, str):
            raise self.error(f"field {self._name(names)} must be a string, not {value!r}")
        return value

    def token(self, name: str) -> int | None:
        """A token id, or None where it is absent, null or negative."""
        ids = self.tokens(name)
        if len(ids) > 1:
            raise self.error(f"field {name} must be one token id, not {list(ids)}")
        return ids[0] if ids else None

    def tokens(self, name: str) -> tuple[int, ...]:
        """Token ids stated as one integer or a list; none where absent or null."""
        value = self.values.get(name)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in listed):
            raise self.error(f"field {name} must be a token id or a list of them, not {value!r}")
        if len(listed) > 1000 or any(entry > LARGEST_SIZE for entry in listed):
            raise self.error(f"field {name} must hold at most 1000 ids of at most {LARGEST_SIZE}")
        return tuple(entry for entry in listed if entry >= 0)

    def _integer(self, names: tuple[str, ...], default: int | None, least: int, what: str) -> int:
        value = self._stated(names, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(f"field {self._name(names)} must be {what}, not {value!r}")
        if value > LARGEST_SIZE:
            raise self.error(f"field {self._name(names)} must be at most {LARGEST_SIZE}")
        return value

    def _stated(self, names: tuple[str, ...], default: Any) -> Any:
        for name in names:
            if self.values.get(name) is not None:
                return self.values[name]
        if default is None:
            raise self.error(f"field {' or '.join(names)} is missing: get the file again")
        return default

    def _name(self, names: tuple[str, ...]) -> str:
        return next((name for name in names if self.values.get(name) is not None), names[0])


def layer_count(fields: Fields, name: str) -> int:
    """The number of layers that ``name`` states, before a list of that length is made."""
    count = fields.integer(name)
    if count > MOST_LAYERS:
        raise fields.error(f"field {name} must be at most {MOST_LAYERS}, not {count}")
    return count
