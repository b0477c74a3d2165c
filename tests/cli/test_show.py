"""What a terminal shows of an answer, by a small terminal of our own."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Generator

import pytest

from supra_cli.talk import terminal
from supra_cli.talk.terminal import ReadingProgress, show

WIDTH = 30
_PIECE = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|(.)", re.DOTALL)


class Screen(io.StringIO):
    """A terminal's rows; a character behind the last column begins the next row."""

    def __init__(self) -> None:
        super().__init__()
        self._rows, self._row, self._column = [""], 0, 0

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for number, action, character in _PIECE.findall(text):
            if character == "\r":
                self._column = 0
            elif character == "\n":
                self._down()
            elif character:
                self._put(character)
            elif action == "A":
                self._row = max(0, self._row - int(number or 1))
            elif action == "K":
                kept = 0 if number == "2" else self._column
                self._rows[self._row] = self._rows[self._row][:kept]
        return len(text)

    def rows(self) -> list[str]:
        """Down to the cursor or the last that is not empty, without blanks at their ends."""
        rows = [row.rstrip() for row in self._rows]
        while len(rows) > self._row + 1 and not rows[-1]:
            del rows[-1]
        return rows

    def _down(self) -> None:
        self._row, self._column = self._row + 1, 0
        self._rows += [""] * (self._row + 1 - len(self._rows))

    def _put(self, character: str) -> None:
        if self._column == WIDTH:
            self._down()
        row = self._rows[self._row].ljust(self._column)
        self._rows[self._row] = row[: self._column] + character + row[self._column + 1 :]
        self._column += 1


class Clock:
    """Seconds that pass when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def on_screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A screen for all output; no fixture, whose streams pytest replaces before the test."""
    made = Screen()
    for name, value in (("COLUMNS", str(WIDTH)), ("LINES", "12"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", made)
    monkeypatch.setattr(sys, "stderr", made)
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(terminal.time, "monotonic", made)
    return made


def read(clock: Clock, progress: ReadingProgress, screen: Screen) -> list[list[str]]:
    """What stands on the screen while a question is read, step by step."""
    shown = []
    for done in (0, 8, 17):
        progress("read", done, 17)
        shown.append(screen.rows())
        clock.now += 2
    return shown


def test_reading_is_shown_and_gone_before_the_answer(
    monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    screen = on_screen(monkeypatch)
    shown: list[list[str]] = []

    def answer() -> Generator[str]:
        shown.extend(read(clock, ReadingProgress(), screen))
        yield "Hello"
        shown.append(screen.rows())
        yield " there.\n\nAnd more"

    show(answer())
    assert shown == [[""], ["read 8 of 17 tokens"], [""], ["Hello"]]
    assert screen.rows() == ["Hello there.", "", "And more", "", ""]


def test_every_question_has_its_own_patience(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """Also after one that Ctrl-C has cut off."""
    screen, progress = on_screen(monkeypatch), ReadingProgress()
    for _ in range(3):
        assert read(clock, progress, screen) == [[""], ["read 8 of 17 tokens"], [""]]
        for _ in range(2):
            clock.now += 100
            progress("read", 512, 1024)
            assert screen.rows() == [""]
        clock.now += 100


def test_lines_to_a_file_have_patience_too(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = ReadingProgress()
    for _ in range(3):
        for done in (512, 1024, 1536):
            progress("read", done, 1536)
            clock.now += 3
        clock.now += 100
    assert capsys.readouterr().err.splitlines() == ["read 1,536 of 1,536 tokens"] * 3


@pytest.mark.parametrize(
    "text",
    [
        "Hello there",
        "word " * 30,
        "x" * 100,
        "```py\nx = 1\n",
        "- a\n- two two two two two two two",
    ],
)
def test_ctrl_c_leaves_no_line_twice(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """The terminal itself writes ^C behind the growing block, which is then drawn whole."""
    whole = on_screen(monkeypatch)
    show(piece for piece in text)
    screen = on_screen(monkeypatch)

    def interrupted() -> Generator[str]:
        yield from text
        screen.write("^C")
        raise KeyboardInterrupt

    show(interrupted())
    *lines, below, last = whole.rows()
    assert (below, last) == ("", "")
    assert screen.rows() == [*lines, " [stopped]", ""]


@pytest.mark.parametrize("seconds", [0, 2])
def test_ctrl_c_while_reading(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, seconds: float
) -> None:
    screen = on_screen(monkeypatch)
    progress = ReadingProgress()

    def interrupted() -> Generator[str]:
        for done in (0, 512, 1024):
            progress("read", done, 2048)
            clock.now += seconds
        screen.write("^C")
        raise KeyboardInterrupt
        yield ""

    show(interrupted())
    assert screen.rows() == [" [stopped]", ""]
