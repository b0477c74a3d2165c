"""The library's messages name fields in backticks; the command line prints its flags instead."""

from __future__ import annotations

import re
from collections.abc import Mapping

import typer

_FIELD = re.compile(r"`(\w+)(=[^\s`]+)?`")
# Fields of the library whose flag has another name.
_RENAMED = {"preset": "recipe", "quantise": "quantize"}


def flags_of(command: object) -> dict[str, str]:
    """Field -> flag of a command; ``name=False`` and ``name=None`` -> its ``--no-`` flag."""
    flags = {}
    for parameter in getattr(command, "params", ()):
        if isinstance(parameter, typer.core.TyperOption) and parameter.name:
            flags[parameter.name] = parameter.opts[0]
            for off in parameter.secondary_opts:
                flags |= {f"{parameter.name}={value}": off for value in (False, None)}
    return flags | {field: flags[name] for field, name in _RENAMED.items() if name in flags}


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """``message`` with `field` and `field=value` as ``--flag`` and ``--flag value``.

    A field that has no flag stays as it is.
    """

    def flag(found: re.Match[str]) -> str:
        name, value = found[1], found[2] or ""
        if name + value in flags:
            return flags[name + value]
        return f"{flags[name]} {value[1:]}" if name in flags else found[0]

    return _FIELD.sub(flag, message)
