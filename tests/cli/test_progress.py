"""Plain lines of progress: how far, how long, how long still."""

from __future__ import annotations

import pytest

from supra_cli.shared import progress as progress_module
from supra_cli.shared.progress import ProgressReporter
from supra_core.progress import duration


def test_time_left_is_by_what_was_done_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half was done before: the other half is not taken to be as quick."""
    now = 1000.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now)
    with ProgressReporter() as report:
        for done in (50, 55, 100):
            report("distill", done, 100, loss=2.0)
            now += 60
    assert capsys.readouterr().err.splitlines() == [
        "distill   50 %  0 s  loss 2",
        "distill   55 %  60 s  9 min 0 s left  loss 2",
        "distill  100 %  120 s  loss 2",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 1 s"), (7500, "2 h 5 min"), (273_600, "3 d 4 h")],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text
