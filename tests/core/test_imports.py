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
# Package -> its rooms, and the files at its top: each imports only those before it.
ROOMS = {
    "supra_core": "visible errors progress tensors mixers model families formats hub text data "
    "artifact sources runtime conversion measure",
    "backends/supra_torch": "devices precision ops recipes model hf inference calibration "
    "distributed run_folder uptrain benchmark plan",
    "backends/supra_mlx": "feed_forward metal norms numbered pieces rotary ops selftest "
    "windowed_attention mixers model weights caches generate quantize backend batch stock_backend "
    "benchmark engine",
    "cli/supra_cli": "launch shared evaluation synthesis demo report_card serving talk commands "
    "main __main__",
}


def _modules(package: str) -> dict[str, Path]:
    """Every module of a package, by its dotted name."""
    root = (ROOT / package).parent
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def _room(module: str, package: str) -> str:
    return module.split(".")[1] if "." in module else ROOMS[package].split()[-1]


def _imported_modules(path: Path, modules: dict[str, Path]) -> Iterator[str]:
    """Those of the same package, inside functions and under TYPE_CHECKING as well."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


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


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_only_rooms_before_them(package: str) -> None:
    """Files at the top of a package are rooms of their own name."""
    order, wrong = ROOMS[package].split(), []
    modules = _modules(package)
    for module, path in modules.items():
        for imported in _imported_modules(path, modules):
            room, other = _room(module, package), _room(imported, package)
            if order.index(other) > order.index(room):
                wrong.append(f"{module} imports {imported}")
    assert wrong == []


@pytest.mark.parametrize("package", ROOMS)
def test_no_module_imports_itself_by_way_of_others(package: str) -> None:
    modules = _modules(package)
    left = {name: set(_imported_modules(path, modules)) for name, path in modules.items()}
    while ready := {name for name, needs in left.items() if not needs & left.keys() - {name}}:
        left = {name: needs for name, needs in left.items() if name not in ready}
    assert sorted(left) == []


def test_no_room_of_the_core_is_crowded() -> None:
    core = ROOT / "supra_core"
    rooms = {path.parent for path in core.rglob("*.py")}
    crowded = {str(room.relative_to(ROOT)): len(list(room.glob("*.py"))) for room in rooms}
    assert {room: files for room, files in crowded.items() if files > 20} == {}


def test_importing_the_core_loads_no_framework() -> None:
    modules = sorted(_modules("supra_core"))
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
