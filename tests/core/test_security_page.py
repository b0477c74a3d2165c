"""SECURITY.md states the limits that the code has, and what it says is off is off."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from supra_core import errors
from supra_core.formats import assets, jsonfile, safetensors
from supra_core.formats.gguf import header as gguf_header
from supra_core.formats.pickle import checkpoint as torch_pickle
from supra_core.formats.pickle import machine as pickle_machine
from supra_core.formats.pickle import values as torch_values
from supra_core.formats.pickle import zip_records
from supra_core.mixers import checks
from supra_core.model import spec
from supra_core.text import files, worker

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "SECURITY.md").read_text()
LIMITS: dict[str, tuple[int, ...]] = {
    "config": (jsonfile.CONFIG_BYTES,),
    "index of weights": (jsonfile.INDEX_BYTES,),
    "depth of JSON": (jsonfile.DEPTH,),
    "whole number of a config, size of a spec, token id": (checks.LARGEST_SIZE,),
    "layers": (spec.MOST_LAYERS,),
    "experts in all layers": (spec.MOST_EXPERTS,),
    "safetensors header": (safetensors.HEADER_BYTES,),
    "axes of a tensor": (safetensors.RANK, gguf_header.RANK),
    "characters of a tensor's name": (safetensors.NAME_LENGTH,),
    "`data.pkl`, or all that comes before the numbers in files before 1.6": (
        torch_pickle.PICKLE_BYTES,
    ),
    "opcodes of a pickle": (pickle_machine.OPCODES,),
    "its stack, its open levels, its memory": (
        pickle_machine.STACK, pickle_machine.MARKS, pickle_machine.MEMO,
    ),
    "a string, a key, a whole number in it": (
        pickle_machine.TEXT, pickle_machine.KEY, pickle_machine.NUMBER_BYTES,
    ),
    "entries that its calls make in all": (pickle_machine.MADE,),
    "records of a zip, bytes of its directory": (
        zip_records.RECORDS, zip_records.DIRECTORY_BYTES,
    ),
    "numbers of a view that repeats its storage by strides of 0": (torch_values.REPEATED,),
    "tensors of one file that share storages": (
        torch_pickle.SHARING, torch_pickle.SHARING_BYTES,
    ),
    "GGUF metadata": (
        gguf_header.METADATA_BYTES, gguf_header.ENTRIES, gguf_header.LISTED,
    ),
    "GGUF tensors": (gguf_header.TENSORS,),
    "a string in a GGUF, and one in a list": (
        gguf_header.STRING_BYTES, gguf_header.LISTED_STRING_BYTES,
    ),
    "computing for a text or a conversation, and characters for a second more": (
        worker.SECONDS, worker.CHARACTERS_PER_SECOND,
    ),
    "memory of the process that does it (not on macOS)": (worker.MEMORY,),
    "characters that decoding may make of one": (files.MOST_GROWTH,),
    "one asset": (assets.ASSET_BYTES,),
    "an error's message": (errors.MESSAGE_LENGTH,),
}  # fmt: skip


def _rows() -> dict[str, str]:
    table = PAGE.partition("## Limits")[2].partition("\n\n`tests/")[0]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {name: value for name, value in cells[1:] if not name.startswith("---")}


def test_every_limit_is_on_the_page_and_no_other() -> None:
    rows = _rows()
    assert rows.keys() == LIMITS.keys()
    for name, numbers in LIMITS.items():
        assert [f"{number:,}" for number in numbers] == [
            word.strip(",") for word in rows[name].split() if word[0].isdigit()
        ], name


def test_one_limit_for_names() -> None:
    assert gguf_header.NAME_BYTES == safetensors.NAME_LENGTH


SOURCES = sorted(
    path for part in ("supra_core", "backends", "cli") for path in (ROOT / part).rglob("*.py")
)


@pytest.mark.parametrize("forbidden", ["eval", "exec", "compile", "__import__"])
def test_no_module_calls(forbidden: str) -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            assert not (called and node.func.id == forbidden), path


def test_nothing_unpickles_and_nothing_trusts_code() -> None:
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = {alias.name for alias in node.names}
                assert not names & {"pickle", "marshal", "shelve", "dill", "joblib"}, path
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("pickle", "marshal", "shelve"), path
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), path
