"""Text that every Python has: the documentation in its standard library, as plain prose."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_SHORTEST_PARAGRAPH = 40
# Below this share of letters and spaces a paragraph is code, a table or a signature.
_PROSE = 0.8
_ORDER_SEED = 0


def documents() -> list[str]:
    """One text a module or topic, a paragraph a line, in an order that is always the same.

    Paragraphs that stand in several places appear once. Topics come first, since conversions are
    calibrated on them; modules are shuffled, so that the last ones are a fair sample of them.
    """
    seen: set[str] = set()

    def new_texts(raws: Iterable[str]) -> list[str]:
        texts = []
        for raw in raws:
            new = [p for p in dict.fromkeys(_paragraphs(raw)) if p not in seen]
            seen.update(new)
            if new:
                texts.append("\n".join(new))
        return texts

    topics, modules = new_texts(_topics()), new_texts(_modules())
    random.Random(_ORDER_SEED).shuffle(modules)
    return topics + modules


def language_reference() -> str:
    """The topics of ``help()`` as they stand: 450 KB that need no scanning of modules."""
    return "\n\n".join(_topics())


def split(texts: list[str], held_out_characters: int) -> tuple[str, str]:
    """(training text, held-out text): whole documents, the last ones held out."""
    held_out: list[str] = []
    first = len(texts)
    while first > 1 and sum(map(len, held_out)) < held_out_characters:
        first -= 1
        held_out.append(texts[first])
    return "\n".join(texts[:first]) + "\n", "\n".join(reversed(held_out)) + "\n"


def _topics() -> Iterator[str]:
    """The language reference, as ``help()`` shows it."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def _modules() -> Iterator[str]:
    """All docstrings of each module of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            with warnings.catch_warnings():
                # Old modules have escapes that newer compilers warn of.
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        yield "\n\n".join(_docstrings(tree))


def _docstrings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring


def _paragraphs(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", text):
        paragraph = " ".join(block.split())
        if len(paragraph) >= _SHORTEST_PARAGRAPH and ">>>" not in paragraph:
            prose = sum(c.isalpha() or c == " " for c in paragraph)
            if prose >= _PROSE * len(paragraph):
                yield paragraph
