"""One file made of modules of ours, for programs that load a model's code from its folder.

Such a file has to stand alone: it holds the modules that its roots need, one after the other,
without their imports of each other. Names that two modules define get a number in the later one.
None of the modules is imported: mlx or torch need not be installed where a folder is written.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

from supra_core.errors import SupraError

# Needs nothing but the standard library.
PYDANTIC = "supra_core.artifact.plain_schema"
_OURS = ("supra_core", "supra_mlx", "supra_torch")
_ELSEWHERE = ("pydantic", "__future__")


def joined(head: str, root: str, stand_ins: Mapping[str, str] | None = None) -> str:
    """``head``, then the code of all that ``root`` needs, each module after those it imports.

    ``stand_ins``: modules that take the place of others. SupraError if names would be confused.
    """
    modules = modules_of(root, stand_ins)
    sources = {module: _source(module) for module in [PYDANTIC, *modules]}
    names = _unique_names(sources, stand_ins or {})
    parts = [
        f"\n# --- {module} ---\n\n{_body(module, source, names[module])}"
        for module, source in sources.items()
    ]
    return "\n".join([head, *parts])


def modules_of(root: str, stand_ins: Mapping[str, str] | None = None) -> list[str]:
    """The modules of ours that ``root`` needs, itself included, each after those it imports."""
    found: dict[str, None] = {}

    def add(module: str) -> None:
        for imported, _ in _imports(_source(module), stand_ins or {}):
            if imported not in found:
                add(imported)
        found[module] = None

    add(root)
    return list(found)


def installed_folder(package: str) -> Path:
    """Where a package of ours is."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SupraError(f"{package} is not installed with supra: install supra-lm again")
    return Path(found.submodule_search_locations[0])


def _imports(source: str, stand_ins: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The modules of ours that a module imports at its top, and what it takes of them."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            for alias in node.names:
                inner, outer = f"{node.module}.{alias.name}", str(node.module)
                module = inner if _path(inner) else outer
                yield stand_ins.get(module, module), alias.name


def _unique_names(
    sources: Mapping[str, str], stand_ins: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """What each module calls otherwise than its source does."""
    count: dict[str, int] = {}
    renamed: dict[str, dict[str, str]] = {}
    for module, source in sources.items():
        own = renamed[module] = {
            name: renamed[origin][name]
            for origin, name in _imports(source, stand_ins)
            if name in renamed[origin]
        }
        for name in _defined(ast.parse(source).body):
            count[name] = count.get(name, 0) + 1
            if count[name] > 1 and name != "_":
                own[name] = f"{name}_{count[name]}"
    return renamed


def _defined(body: list[ast.stmt]) -> set[str]:
    """The names that statements at the top of a module define."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = (name for target in targets for name in ast.walk(target))
            names |= {name.id for name in found if isinstance(name, ast.Name)}
        elif isinstance(node, ast.If | ast.Try):
            names |= _defined([*node.body, *node.orelse])
    return {name for name in names if not name.startswith("__")}


def _body(module: str, source: str, names: Mapping[str, str]) -> str:
    """A module's code with its new names, without its docstring, its future and our imports."""
    lines = source.encode().splitlines()
    tree = ast.parse(source)
    for line, column, name in sorted(_places(module, tree, names), reverse=True):
        text = lines[line]
        assert text[column:].startswith(name.encode()), (module, name)
        lines[line] = text[:column] + names[name].encode() + text[column + len(name) :]
    for node in reversed(tree.body):
        if node.end_lineno is not None and _left_out(node):
            del lines[node.lineno - 1 : node.end_lineno]
    return b"\n".join(lines).decode().strip() + "\n"


def _places(
    module: str, tree: ast.Module, names: Mapping[str, str]
) -> Iterator[tuple[int, int, str]]:
    """The line and byte of every use of the names."""
    fields = {
        id(field.target)
        for part in ast.walk(tree)
        if isinstance(part, ast.ClassDef)
        for field in part.body
        if isinstance(field, ast.AnnAssign)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names and id(node) not in fields:
            yield node.lineno - 1, node.col_offset, node.id
        elif isinstance(node, ast.arg | ast.Global) and names.keys() & {
            getattr(node, "arg", None), *getattr(node, "names", ())
        }:  # fmt: skip
            raise SupraError(
                f"{module}: line {node.lineno} gives a name that other modules define too, and "
                "that this module also has at its top: call it otherwise"
            )
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in names:
            keyword = "def " if isinstance(node, ast.FunctionDef) else "class "
            yield node.lineno - 1, node.col_offset + len(keyword), node.name


def _left_out(node: ast.stmt) -> bool:
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").split(".")[0] in _ELSEWHERE or _is_ours(node.module)
    if isinstance(node, ast.If) and not node.orelse and ast.unparse(node.test) == "TYPE_CHECKING":
        return True
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_ours(module: str | None) -> bool:
    return (module or "").split(".")[0] in _OURS


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
