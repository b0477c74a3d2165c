"""Fields in the library's messages are printed as the flags of the command that was run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

import supra_core
from supra_cli.main import app
from supra_cli.shared.flags import flags_of, with_flags

CORE = Path(supra_core.__file__).parent


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("`rope_factors` 'x' is unknown", "--rope-factors 'x' is unknown"),
        ("`preset` 'x' is unknown", "--recipe 'x' is unknown"),
        ("omit `quantise` for `to=hf`", "omit --quantize for --to hf"),
        ("`linearize=False` contradicts", "--no-linearize contradicts"),
        ("convert it with `calibrate=None`", "convert it with --no-calibrate"),
        ("`source` and `nothing=1` have no flag", "`source` and `nothing=1` have no flag"),
        ("log in by `hf auth login`", "log in by `hf auth login`"),
    ],
)
def test_flags_of_convert(message: str, shown: str) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert with_flags(message, flags_of(commands["convert"])) == shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("convert MODEL OUT --recipe x", "--recipe 'x' is unknown: use one of paper"),
        ("convert MODEL OUT --to x", "--to 'x' is unknown: use one of supra, hf, openlm"),
        ("convert MODEL OUT --seed -1", "--seed must be at least 0, not -1"),
        ("convert MODEL OUT --window 0", "--window must be at least 1 token, not 0"),
        ("convert MODEL OUT --keep-softmax 9", "--keep-softmax names layer 9"),
        ("convert MODEL OUT --no-linearize --recipe pure", "--no-linearize contradicts"),
        ("convert MODEL OUT --no-linearize --fold", "omit --fold"),
        ("convert MODEL OUT --to hf --calibrate", "omit --calibrate"),
        ("convert MODEL OUT --revision main", "has no revisions: omit --revision"),
        ("convert MODEL FULL", "replace it with --force"),
        ("data prepare TEXT --tokenizer MODEL --out MODEL", "replace it with --force"),
        ("data synthesize MODEL OUT --tokens 9 --top-p 2", "--top-p must be above 0"),
        ("verify MODEL --backend torch", "name a second --backend"),
    ],
)
def test_a_message_names_the_flag(
    arguments: str, sentence: str, tiny_transformer: Path, text_file: Path, tmp_path: Path
) -> None:
    places = {
        "MODEL": tiny_transformer,
        "TEXT": text_file,
        "OUT": tmp_path / "out",
        "FULL": text_file.parent,
    }
    words = re.sub("MODEL|TEXT|OUT|FULL", lambda found: str(places[found[0]]), arguments).split()
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and sentence in done.stderr, done.output
    assert "`" not in done.stderr


def _commands(command: object) -> list[object]:
    inner = getattr(command, "commands", {}).values()
    return [command, *(leaf for one in inner for leaf in _commands(one))]


def test_every_field_that_the_library_names_has_a_flag() -> None:
    flags = {name for command in _commands(get_command(app)) for name in flags_of(command)}
    for file in CORE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Raise):
                for name in re.findall(r"(?<!`)`(\w+)(?==|`)", ast.unparse(node)):
                    assert name in flags, f"{file.name}: {name}"
