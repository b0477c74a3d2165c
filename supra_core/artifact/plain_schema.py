"""What :mod:`supra_core.model.spec` takes of pydantic, by the standard library alone.

It stands in for pydantic in the model file of an artifact, which must run where neither is
installed. It reads what supra wrote: types are not checked beyond what the spec itself checks.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class ValidationError(ValueError):
    """A dictionary that describes no such object."""

    def errors(self) -> list[dict[str, Any]]:
        """As pydantic lists them."""
        return [{"loc": (), "msg": str(self)}]


def ConfigDict(**settings: Any) -> dict[str, Any]:
    """Settings of pydantic's, which have no effect here."""
    return settings


def Field(**settings: Any) -> None:
    """A union's discriminator, which is always the field ``kind``."""


def dataclass(*, frozen: bool, config: Any) -> Callable[[type[T]], type[T]]:
    """The standard library's dataclass."""
    return dataclasses.dataclass(frozen=frozen)


class TypeAdapter(Generic[T]):
    """Objects of a dataclass from dictionaries."""

    def __init__(self, kind: type[T]) -> None:
        self._build = _builder(kind)

    def validate_json(self, text: str) -> T:
        """The object that JSON describes; ValidationError when it describes none."""
        try:
            return self._build(json.loads(text))  # type: ignore[no-any-return]
        except (TypeError, KeyError) as error:
            raise ValidationError(f"{type(error).__name__}: {error}") from None


def _builder(kind: Any) -> Callable[[Any], Any]:
    """What makes an object of a type from plain JSON."""
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _builder(typing.get_args(kind)[0])
    if origin in (typing.Union, types.UnionType):
        return _one_of(typing.get_args(kind))
    if origin is tuple:
        item = _builder(typing.get_args(kind)[0])
        return lambda value: tuple(item(entry) for entry in value)
    if not dataclasses.is_dataclass(kind):
        return lambda value: value
    hints = typing.get_type_hints(kind, include_extras=True)
    builders = {field.name: _builder(hints[field.name]) for field in dataclasses.fields(kind)}
    make: Any = kind
    return lambda value: make(**{name: builders[name](entry) for name, entry in value.items()})


def _one_of(kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Of a union: None as it is, an object by its ``kind``, anything else by the only other."""
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1:
        build = _builder(others[0])
        return lambda value: None if value is None else build(value)
    builders = {}
    for kind in others:
        if dataclasses.is_dataclass(kind):
            builders[next(f.default for f in dataclasses.fields(kind) if f.name == "kind")] = kind
    made = {name: _builder(kind) for name, kind in builders.items()}
    return lambda value: None if value is None else made[value["kind"]](value)
