"""The chat on a terminal: every command, Ctrl-C, pasting many lines, the end of input."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pexpect = pytest.importorskip("pexpect")
pytest.importorskip("mlx.core")

from supra_core.formats.safetensors import read_file, write_file  # noqa: E402
from supra_core.runtime.state_file import read_state  # noqa: E402
from supra_core.tensors import LazyTensor  # noqa: E402
from tests.mlx.chat import END_OF_TURN, write_chat_model  # noqa: E402
from tests.mlx.models import SPECS  # noqa: E402

WEIGHTS = "model.safetensors"
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b[=>]|\r")
ASKS_FOR_THE_CURSOR = r"\x1b\[6n"
PASTE = "\x1b[200~{}\x1b[201~"


class Terminal:
    """A chat on a pseudo-terminal; what it shows, without what moves the cursor."""

    def __init__(self, folder: Path, home: Path, *arguments: str) -> None:
        variables = {"HOME": str(home), "XDG_CONFIG_HOME": str(home), "TERM": "xterm-256color"}
        self.child = pexpect.spawn(
            sys.executable, ["-m", "supra_cli", "chat", str(folder), *arguments],
            env=os.environ | variables, dimensions=(40, 200), timeout=60, encoding="utf-8",
        )  # fmt: skip
        self.child.delaybeforesend = 0.1
        self.expect("Type a message")

    def expect(self, pattern: str) -> str:
        """What came up to the pattern."""
        shown = ""
        while self.child.expect([pattern, ASKS_FOR_THE_CURSOR]):
            shown += self.child.before
            self.child.send("\x1b[1;1R")
        return CONTROL.sub("", shown + self.child.before + self.child.after)

    def line(self, text: str, pattern: str) -> str:
        """Type a line; what comes of it, up to the pattern."""
        self.child.send(text + "\r")
        return self.expect(pattern)

    def leave(self, keys: str) -> int:
        self.child.send(keys)
        self.child.expect(pexpect.EOF)
        self.child.close()
        return int(self.child.exitstatus)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("models") / "tiny", SPECS["windowed"])


@pytest.fixture(scope="module")
def endless(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model without the end of a turn: a row of zeros is never the likeliest token."""
    copy = tmp_path_factory.mktemp("endless") / "tiny"
    shutil.copytree(folder, copy)
    weights = {name: tensor.read() for name, tensor in read_file(copy / WEIGHTS).items()}
    for name in weights.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        weights[name] = np.array(weights[name])
        weights[name][END_OF_TURN] = 0
    (copy / WEIGHTS).unlink()
    tensors = {name: LazyTensor.of(weight) for name, weight in weights.items()}
    write_file(copy / WEIGHTS, tensors, {"format": "pt"})
    return copy


@pytest.fixture
def terminal(folder: Path, tmp_path: Path) -> Iterator[Terminal]:
    made = Terminal(folder, tmp_path, "--max-tokens", "8", "--backend", "mlx")
    yield made
    made.child.close(force=True)


def test_every_command(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The handbook says so.")
    saved = tmp_path / "chat.state"
    shown = terminal.line("/help", "several lines")
    for name in ("clear", "system", "read", "undo", "regen", "branch", "save", "load", "set"):
        assert f"/{name}" in shown
    terminal.line("/set max_tokens 6", "max_tokens 6")
    terminal.line("/system Be brief.", "new conversation")
    terminal.line("Hello", "tokens seen, ")
    terminal.line("/stats", "1 turn; last turn: .* 6 generated")
    terminal.line("/branch side", "side: 1 turn")
    terminal.line("And more", "tokens seen, ")
    terminal.line("/undo", "Removed: And more")
    terminal.line("/branch main", "main: 1 turn")
    terminal.line("/branch", r"main \(here\), side")
    terminal.line("/regen", "tokens seen, ")
    terminal.line(f"/save {saved}", "Saved .*chat.state")
    assert [m["role"] for m in read_state(saved).messages] == ["system", "user", "assistant"]
    terminal.line(f"/save {saved}", "--force")
    terminal.line("/clear", "new conversation")
    terminal.line(f"/read {tmp_path / 'text.txt'}", r"Read .*tokens")
    terminal.line(f"/load {saved}", "1 turn, ")
    terminal.line("/undo", "Removed: Hello")
    terminal.line("/undo", "no turn to undo")
    terminal.line("/nonsense", "no command /nonsense")
    assert terminal.leave("/exit\r") == 0


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(endless: Path, tmp_path: Path) -> None:
    terminal = Terminal(endless, tmp_path, "--max-tokens", "1000000", "--backend", "mlx")
    # A line that is drawn anew again and again: an answer.
    terminal.line("Go on for ever", r"(\x1b\[2K[^\x1b]*){5}")
    terminal.child.sendintr()
    terminal.expect(r"\[stopped\]")
    terminal.line("/stats", "1 turn; ")
    # At an empty line it says how to leave; in a half-typed one it drops that.
    terminal.child.send("half a line")
    terminal.child.sendintr()
    terminal.expect("leaves")
    terminal.line("/set max_tokens 5", "max_tokens 5")
    terminal.line("Again", "tokens seen, ")
    terminal.line("/stats", "2 turns; ")
    assert terminal.leave("\x04") == 0


@pytest.mark.slow
def test_many_lines_are_one_question(terminal: Terminal, tmp_path: Path) -> None:
    saved = tmp_path / "chat.state"
    terminal.line(PASTE.format("first line\nsecond line\n\nfourth line"), "tokens seen, ")
    for line in ('"""begins', "/goes on"):
        terminal.child.send(line + "\r")
    terminal.line('and ends"""', "tokens seen, ")
    terminal.line(f"/save {saved}", "Saved ")
    questions = [m["content"] for m in read_state(saved).messages if m["role"] == "user"]
    assert questions == ["first line\nsecond line\n\nfourth line", "begins\n/goes on\nand ends"]
    assert terminal.leave("\x04") == 0


@pytest.mark.slow
def test_lines_are_remembered(folder: Path, tmp_path: Path) -> None:
    first = Terminal(folder, tmp_path, "--max-tokens", "4", "--backend", "mlx")
    first.line("a memorable line", "tokens seen, ")
    assert first.leave("\x04") == 0
    second = Terminal(folder, tmp_path, "--max-tokens", "4", "--backend", "mlx")
    # The arrow upwards.
    second.child.send("\x1b[A")
    second.expect("a memorable line")
    assert second.leave("\x15\x04") == 0
