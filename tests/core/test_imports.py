"""Who may import whom, and what an import may cost."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from supra_core.artifact import mlx_file

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = {"torch", "mlx", "mlx_lm", "transformers", "triton"}
BACKENDS = {"supra_torch", "supra_mlx"}

# Package -> what it must not import when it is itself imported.
AT_IMPORT = {
    "supra_core": FRAMEWORKS | BACKENDS | {"supra_cli", "typer", "rich"},
    "cli/supra_cli": FRAMEWORKS | BACKENDS | {"matplotlib"},
}
# Package -> what it must not import anywhere, functions included.
ANYWHERE = {
    "supra_core": FRAMEWORKS | BACKENDS | {"supra_cli", "typer", "rich"},
    "backends/supra_torch": {"supra_mlx", "supra_cli", "mlx", "mlx_lm"},
    "backends/supra_mlx": {"supra_torch", "supra_cli", "torch"},
}


def _imports(node: ast.AST, *, inside_functions: bool) -> Iterator[str]:
    """Top-level names of imported packages."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name.split(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield (child.module or "").split(".")[0]
        elif not _skipped(child, inside_functions):
            yield from _imports(child, inside_functions=inside_functions)


def _skipped(node: ast.AST, inside_functions: bool) -> bool:
    """Function bodies run later, if at all; blocks under TYPE_CHECKING never do."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside_functions


def _violations(package: str, forbidden: set[str], *, inside_functions: bool) -> list[str]:
    found = []
    for path in sorted((ROOT / package).rglob("*.py")):
        names = set(_imports(ast.parse(path.read_bytes()), inside_functions=inside_functions))
        found += [f"{path.relative_to(ROOT)} imports {name}" for name in sorted(names & forbidden)]
    return found


@pytest.mark.parametrize("package", AT_IMPORT)
def test_heavy_imports_are_lazy(package: str) -> None:
    assert _violations(package, AT_IMPORT[package], inside_functions=False) == []


@pytest.mark.parametrize("package", ANYWHERE)
def test_packages_keep_to_their_side(package: str) -> None:
    assert _violations(package, ANYWHERE[package], inside_functions=True) == []


def test_importing_the_core_loads_no_framework() -> None:
    modules = ["supra_core"] + [
        f"supra_core.{path.stem}"
        for path in sorted((ROOT / "supra_core").glob("*.py"))
        if path.stem != "__init__"
    ]
    program = (
        f"import sys, importlib\nfor name in {modules!r}: importlib.import_module(name)\n"
        f"print(sorted(set({sorted(FRAMEWORKS | BACKENDS)!r}) & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "program", ["import os, supra_mlx\n", mlx_file._HEAD], ids=["ours", "file"]
)
@pytest.mark.parametrize(("before", "after"), [(None, "0"), ("1", "1")])
def test_mlx_multiplies_float32_as_float32(program: str, before: str | None, after: str) -> None:
    """Unless the user says otherwise: the variable is read once, at the first product."""
    environment = {name: value for name, value in os.environ.items() if name != "MLX_ENABLE_TF32"}
    if before is not None:
        environment["MLX_ENABLE_TF32"] = before
    asked = f"{program}import sys\nprint(os.environ['MLX_ENABLE_TF32'], 'mlx.core' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == [after, "False"], done.stderr
