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
# Each uses names of those before it only.
MODULES = (
    "supra_core.artifact.plain_schema",
    "supra_core.errors",
    "supra_core.model.spec",
    "supra_core.families.shared.fields",
    "supra_core.artifact.config",
    "supra_core.model.decay",
    "supra_core.model.rotary",
    "supra_core.model.layout",
    "supra_mlx.rotary",
    "supra_mlx.metal",
    "supra_mlx.ops",
    "supra_mlx.window",
    "supra_mlx.feed_forward",
    "supra_mlx.model",
)
_OURS = ("supra_core", "supra_mlx", "pydantic")
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
    parts = [_HEAD]
    for module in MODULES:
        parts.append(f"\n# --- {module} ---\n\n{_body(_source(module))}")
    return "\n".join(parts)


def _body(source: str) -> str:
    """A module's code without its docstring, its future and our imports."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if node.end_lineno is not None and _left_out(node):
            del lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(lines).strip() + "\n"


def _left_out(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] in (*_OURS, "__future__")
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _source(module: str) -> str:
    package, *rest = module.split(".")
    return installed_folder(package).joinpath(*rest).with_suffix(".py").read_text("utf-8")


def installed_folder(package: str) -> Path:
    """Where a package of ours is. It is not imported: mlx or torch need not be installed where a
    folder is written."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SupraError(f"{package} is not installed with supra: install supra-lm again")
    return Path(found.submodule_search_locations[0])
