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
        return [{"type": "", "loc": (), "msg": str(self)}]


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
        self._build = _builder(kind)

    def validate_json(self, text: str, **how: bool) -> T:
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
    builders = {
        _file_name(field.name, hints[field.name]): (field.name, _builder(hints[field.name]))
        for field in dataclasses.fields(kind)
    }
    make: Any = kind

    def built(value: dict[str, Any]) -> Any:
        made = ((builders[name], entry) for name, entry in value.items())
        return make(**{own: build(entry) for (own, build), entry in made})

    return built


def _file_name(name: str, hint: Any) -> str:
    """What files call a field."""
    aliases = (getattr(note, "alias", None) for note in getattr(hint, "__metadata__", ()))
    return next(filter(None, aliases), name)


def _one_of(kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Of a union: None as it is, an object by its ``kind``, anything else by the only other."""
    others = [kind for kind in kinds if kind is not type(None)]
    if len(others) == 1:
        build = _builder(others[0])
        return lambda value: None if value is None else build(value)
    made = {kind.kind: _builder(kind) for kind in others if hasattr(kind, "kind")}

    def chosen(value: Any) -> Any:
        if value is None:
            return None
        if value["kind"] not in made:
            known = ", ".join(made)
            raise ValidationError(f"kind '{value['kind']}' is unknown: use one of {known}")
        return made[value["kind"]](value)

    return chosen
