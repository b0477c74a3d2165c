"""The library names fields and values; only the command line names its flags."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import supra_core

CORE = Path(supra_core.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
# Of mlx-lm, in the files that an artifact holds.
THEIRS = {"--model", "--trust-remote-code"}


def _constants(tree: ast.Module) -> Iterator[ast.Constant]:
    """The constants of a module except docstrings, which are statements."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            yield node


def test_no_string_of_the_library_names_a_flag() -> None:
    found = [
        f"{file.relative_to(CORE)}:{node.lineno}: {flag}"
        for file in sorted(CORE.rglob("*.py"))
        for node in _constants(ast.parse(file.read_text("utf-8")))
        for flag in FLAG.findall(str(node.value))
        if flag not in THEIRS
    ]
    assert not found
