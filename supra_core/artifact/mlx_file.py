"""The file that lets stock mlx-lm build the model of an artifact.

mlx-lm runs the ``model_file`` that a folder's config.json names, when its user allows that. The
file has to stand alone, so it is put together from our own modules: one after the other, without
their imports of each other, and with the standard library in pydantic's place. ``supra`` itself
never runs it.
"""

from __future__ import annotations

import ast
import importlib.util
from functools import cache
from pathlib import Path

from supra_core.errors import SupraError

NAME = "supra_model.py"
_ROOT, _PYDANTIC = "supra_mlx.model", "supra_core.artifact.plain_schema"
_OURS = ("supra_core", "supra_mlx", "supra_torch")
_HEAD = '''"""The model of this folder, for mlx-lm: mlx_lm.generate --model . --trust-remote-code

Written by supra from its own modules (Apache-2.0); to change it, change those.
"""

from __future__ import annotations

import os
import sys

# An M5 would multiply float32 as TF32; MLX reads this at its first product and never again.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
# mlx-lm runs this file without entering it among the modules, where dataclasses look for types.
_module = type("Module", (), {})()
_module.__dict__ = globals()
sys.modules[__name__] = _module
'''


@cache
def text() -> str:
    """The file's content; the same for every model, which config.json describes."""
    return joined(_HEAD, [_PYDANTIC, *modules_of(_ROOT)])


def joined(head: str, modules: list[str]) -> str:
    """The code of modules one after the other, behind ``head``."""
    parts = [f"\n# --- {module} ---\n\n{_body(_source(module))}" for module in modules]
    return "\n".join([head, *parts])


def modules_of(*roots: str) -> list[str]:
    """The modules of ours that ``roots`` need, themselves included, each after those it imports."""
    found: dict[str, None] = {}

    def add(module: str) -> None:
        for imported in _imports(module):
            if imported not in found:
                add(imported)
        found[module] = None

    for root in roots:
        add(root)
    return list(found)


def _imports(module: str) -> list[str]:
    """The modules of ours that a module imports at its top, in order."""
    imported = []
    for node in ast.parse(_source(module)).body:
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                imported.append(inner if _path(inner) else str(node.module))
    return imported


def _is_ours(module: str | None) -> bool:
    return (module or "").split(".")[0] in _OURS


def _body(source: str) -> str:
    """A module's code without its docstring, its future and our imports."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if node.end_lineno is not None and _left_out(node):
            del lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(lines).strip() + "\n"


def _left_out(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        outside = (node.module or "").split(".")[0] in ("pydantic", "__future__")
        return outside or _is_ours(node.module)
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


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


def installed_folder(package: str) -> Path:
    """Where a package of ours is. It is not imported: mlx or torch need not be installed where a
    folder is written."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SupraError(f"{package} is not installed with supra: install supra-lm again")
    return Path(found.submodule_search_locations[0])
