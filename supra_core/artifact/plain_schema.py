"""What our modules take of pydantic, by the standard library alone.

It stands in for pydantic in the files for stock programs, which run where it is not installed,
and is as strict: a field that is missing, unknown or of another type is an error that names it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_Read = Callable[[Any], Any]


class ValidationError(ValueError):
    """A value that describes no such object; ``loc``: the keys that lead to it."""

    def __init__(self, message: str, *loc: str | int) -> None:
        super().__init__(message)
        self.loc = loc

    def errors(self) -> list[dict[str, Any]]:
        """As pydantic lists them."""
        return [{"loc": self.loc, "msg": str(self), "type": "value_error"}]


def ConfigDict(**settings: Any) -> dict[str, Any]:
    """Settings of pydantic's, which have no effect here."""
    return settings


@dataclasses.dataclass(frozen=True)
class Field:
    """A union's discriminator, which is always the field ``kind``; or what files call a field."""

    discriminator: str | None = None
    alias: str | None = None


def dataclass(*, frozen: bool, config: Any) -> Callable[[type[T]], type[T]]:
    """The standard library's dataclass."""
    return dataclasses.dataclass(frozen=frozen)


class TypeAdapter(Generic[T]):
    """Objects of a dataclass from dictionaries."""

    def __init__(self, kind: type[T]) -> None:
        self._read = _reader(kind)

    def validate_json(self, text: str, **how: bool) -> T:
        """The object that JSON describes; ValidationError when it describes none."""
        return self._read(json.loads(text))  # type: ignore[no-any-return]


def _reader(kind: Any) -> _Read:
    """What makes an object of a type from plain JSON."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _reader(arguments[0])
    if origin is typing.Literal:
        return _one_of_values(arguments)
    if origin in (typing.Union, types.UnionType):
        return _one_of_kinds(arguments)
    if origin is tuple:
        return _sequence(_reader(arguments[0]))
    return _object(kind) if dataclasses.is_dataclass(kind) else _value(kind)


def _value(kind: Any) -> _Read:
    def read(value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind is float and number and math.isfinite(value):
            return float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValidationError(f"must be {_NAMES.get(kind, kind.__name__)}, not {value!r}")
        return value

    return read


_NAMES = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}


def _one_of_values(values: tuple[Any, ...]) -> _Read:
    def read(value: Any) -> Any:
        if not isinstance(value, str) or value not in values:
            raise ValidationError(f"must be {' or '.join(map(repr, values))}, not {value!r}")
        return value

    return read


def _sequence(item: _Read) -> _Read:
    def read(value: Any) -> Any:
        if not isinstance(value, list):
            raise ValidationError(f"must be a list, not {value!r}")
        return tuple(_within(index, item, entry) for index, entry in enumerate(value))

    return read


def _within(place: str | int, read: _Read, value: Any) -> Any:
    try:
        return read(value)
    except ValidationError as error:
        raise ValidationError(str(error), place, *error.loc) from None


def _object(kind: Any) -> _Read:
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = {_file_name(f.name, hints[f.name]): f for f in dataclasses.fields(kind)}
    readers = {name: _reader(hints[field.name]) for name, field in fields.items()}
    needed = [name for name, field in fields.items() if field.default is dataclasses.MISSING]

    def read(stated: Any) -> Any:
        if not isinstance(stated, dict):
            raise ValidationError(f"must be an object, not {stated!r}")
        for name in stated:
            if name not in fields:
                raise ValidationError("is unknown: a newer supra may know it", name)
        for name in needed:
            if name not in stated:
                raise ValidationError("is missing", name)
        values = {name: _within(name, readers[name], value) for name, value in stated.items()}
        return kind(**{fields[name].name: value for name, value in values.items()})

    return read


def _file_name(name: str, hint: Any) -> str:
    """What files call a field."""
    aliases = (getattr(note, "alias", None) for note in getattr(hint, "__metadata__", ()))
    return next(filter(None, aliases), name)


def _one_of_kinds(kinds: tuple[Any, ...]) -> _Read:
    """Of a union: None as it is, an object by its ``kind``, anything else by the only other."""
    others = [kind for kind in kinds if kind is not type(None)]
    made = {str(getattr(kind, "kind", "")): _reader(kind) for kind in others}

    def read(value: Any) -> Any:
        if value is None and len(others) < len(kinds):
            return None
        if len(others) == 1:
            return next(iter(made.values()))(value)
        if not isinstance(value, dict):
            raise ValidationError(f"must be an object, not {value!r}")
        if value.get("kind") not in made:
            known = ", ".join(made)
            raise ValidationError(f"kind {value.get('kind')!r} is unknown: use one of {known}")
        return made[value["kind"]](value)

    return read
