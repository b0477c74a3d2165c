"""Modules of ours joined into one file that needs none of them.

Other programs run such a file from a model's folder, where supra need not be installed. It is made
of our own modules, each after those that it imports, without their imports of each other, and with
the standard library in pydantic's place. All share one namespace: two of them may not define the
same name at their top, and none imports another as a whole or under another name.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from supra_core.errors import SupraError

_OURS = ("supra_core", "supra_mlx", "supra_torch")
_PLAIN_SCHEMA = "supra_core.artifact.plain_schema"


def joined(head: str, modules: Sequence[str]) -> str:
    """The code of ``modules``, in the order of :func:`modules_of`, behind ``head``."""
    parts = [f"\n# --- {module} ---\n\n{_body(_source(module))}" for module in modules]
    return "\n".join([head, *parts])


def modules_of(*roots: str) -> list[str]:
    """What ``roots`` need, themselves included: each module after those that it imports.

    A package stands for its ``__init__``. Imports inside of functions are not followed.
    """
    found: dict[str, None] = {_PLAIN_SCHEMA: None}

    def add(module: str) -> None:
        if module not in found:
            for imported in _imports(module):
                add(imported)
            found[module] = None

    for root in roots:
        add(root)
    return list(found)


def installed_folder(package: str) -> Path:
    """Where a package of ours is. It is not imported: mlx or torch need not be installed where a
    folder is written."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SupraError(f"{package} is not installed with supra: install supra-lm again")
    return Path(found.submodule_search_locations[0])


def _imports(module: str) -> list[str]:
    """The modules of ours that a module imports at its top, in order."""
    imported = []
    for node in ast.parse(_source(module)).body:
        if isinstance(node, ast.ImportFrom) and _package(node) in _OURS:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                imported.append(inner if _path(inner) else str(node.module))
    return imported


def _body(source: str) -> str:
    """A module's code without its docstring, its future and our imports."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if node.end_lineno is not None and _is_omitted(node):
            del lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(lines).strip() + "\n"


def _is_omitted(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return _package(node) in (*_OURS, "pydantic", "__future__")
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _package(node: ast.ImportFrom) -> str:
    return (node.module or "").split(".")[0]


def _source(module: str) -> str:
    path = _path(module)
    assert path is not None, module
    return path.read_text("utf-8")


def _path(module: str) -> Path | None:
    """Where a module is, which may be a package; None if there is no such."""
    package, *rest = module.split(".")
    place = installed_folder(package).joinpath(*rest)
    paths = (place.with_suffix(".py"), place / "__init__.py")
    return next((path for path in paths if path.is_file()), None)
