"""Modules joined into one file share one namespace and leave none of their imports behind."""

from __future__ import annotations

import ast
from collections import Counter

import pytest

from supra_core.artifact import mlx_file
from supra_core.artifact.joined import modules_of

FILES = {"mlx": mlx_file.text}


def defined(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        overload = any("overload" in ast.dump(decorator) for decorator in node.decorator_list)
        return [] if overload else [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


@pytest.mark.parametrize("name", FILES)
def test_a_joined_file_defines_every_name_once_and_imports_nothing_of_ours(name: str) -> None:
    tree = ast.parse(FILES[name]())
    # Two modules may say the same of a name.
    definitions = {(name, ast.dump(node)) for node in tree.body for name in defined(node)}
    times = Counter(name for name, _ in definitions)
    assert [name for name, count in times.items() if count > 1] == []
    imports = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    assert [name for name in imports if name.startswith(("supra_", "pydantic"))] == []


def test_each_module_follows_those_that_it_imports() -> None:
    order = modules_of("supra_core.model.spec")
    assert order.index("supra_core.mixers.base") < order.index("supra_core.mixers.softmax")
    assert order.index("supra_core.mixers") < order.index("supra_core.model.spec") == len(order) - 1
    assert len(set(order)) == len(order)
