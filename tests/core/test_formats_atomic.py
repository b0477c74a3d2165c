"""Outputs appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from supra_core.errors import SupraError
from supra_core.formats import atomic
from supra_core.formats.atomic import atomic_file, atomic_folder, check_replaceable, clear_partial


def test_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_failure_leaves_the_old_folder(tmp_path: Path, error: type[BaseException]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")

    def interrupted() -> None:
        with atomic_folder(out, force=True) as folder:
            (folder / "config.json").write_text("new")
            raise error

    with pytest.raises(error):
        interrupted()
    assert (out / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_existing_folder_needs_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with atomic_folder(out) as folder:  # An empty folder is nobody's loss.
        (folder / "config.json").write_text("1")
    with pytest.raises(SupraError, match="exists already"), atomic_folder(out):
        pass
    with atomic_folder(out, force=True, holds="config.json") as folder:
        (folder / "b").write_text("2")
    assert [path.name for path in out.iterdir()] == ["b"]
    with (
        pytest.raises(SupraError, match=r"holds no config\.json"),
        atomic_folder(out, force=True, holds="config.json"),
    ):
        pass
    assert (out / "b").read_text() == "2"


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(SupraError, match="is a file"), atomic_folder(tmp_path / "out", force=True):
        pass
    with (
        pytest.raises(SupraError, match="could not be written"),
        atomic_folder(tmp_path / "out" / "below"),
    ):
        pass


def test_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_file(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    with atomic_file(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_the_current_folder_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would go on as a deleted folder, in which nothing can be found."""
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    for out, force in ((".", False), ("..", True), (here, False), ("/", True)):
        with pytest.raises(SupraError, match="current folder"), atomic_folder(out, force):
            pass
    with atomic_folder("c") as folder:
        (folder / "config.json").write_text("1")
    assert (here / "c" / "config.json").read_text() == "1"


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(SupraError, match=r"could not be written \(File name too long\)"):
        check_replaceable(tmp_path / ("x" * 300), force=False)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_of_two_folders_one_is_there_and_the_other_refused(tmp_path: Path) -> None:
    """Both were told that the place is free; what the second made is not left behind."""
    out = tmp_path / "out"

    def both() -> None:
        with atomic_folder(out) as second:
            (second / "config.json").write_text("second")
            with atomic_folder(out) as first:
                (first / "config.json").write_text("first")

    with pytest.raises(SupraError, match="out exists already"):
        both()
    assert (out / "config.json").read_text() == "first"
    assert _names(tmp_path) == ["out"]


def test_of_two_forced_folders_the_last_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_folder(out, force=True) as second:
        (second / "config.json").write_text("second")
        with atomic_folder(out, force=True) as first:
            (first / "config.json").write_text("first")
    assert (out / "config.json").read_text() == "second"
    assert _names(tmp_path) == ["out"]


@pytest.mark.parametrize("has_links", [True, False])
def test_of_two_files_one_is_there_and_the_other_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    if not has_links:
        monkeypatch.setattr(os, "link", refused)
    path = tmp_path / "a"

    def both() -> None:
        with atomic_file(path, replace=False) as second:
            second.write_text("second")
            with atomic_file(path, replace=False) as first:
                first.write_text("first")

    with pytest.raises(SupraError, match="a exists"):
        both()
    assert path.read_text() == "first"
    assert _names(tmp_path) == ["a"]


_KILLED = """
import os, signal, sys
from pathlib import Path
from supra_core.formats import atomic
out = Path(sys.argv[1])
if sys.argv[2] == "exchange":
    rename = os.rename
    def killed(one, other):
        rename(one, other)
        os.kill(os.getpid(), signal.SIGKILL)
    os.rename = killed
with atomic.atomic_folder(out, force=True) as folder, atomic.atomic_file(out / "f") as file:
    if sys.argv[2] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "new").write_text("1")
"""


def _killed(out: Path, where: str) -> None:
    done = subprocess.run([sys.executable, "-c", _KILLED, str(out), where], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_what_a_kill_leaves_is_swept_by_the_next_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    _killed(out, "writing")
    assert len(_names(tmp_path)) == 2
    assert len(_names(out)) == 1
    with atomic_folder(out.with_name("out.1")):
        # Another output whose name begins alike.
        assert len(_names(tmp_path)) == 3
    with atomic_file(out / "f"), atomic_file(out / "f"):
        # The second one leaves the first one's alone.
        assert len(_names(out)) == 2
    with atomic_folder(out, force=True) as folder, atomic_folder(out, force=True) as other:
        assert folder.is_dir()
        assert other.is_dir()
    assert _names(tmp_path) == ["out", "out.1"]


def test_what_was_set_aside_comes_back(tmp_path: Path) -> None:
    clear_partial(tmp_path / "absent")
    out = tmp_path / "out"
    for recover in (lambda: clear_partial(tmp_path), lambda: check_replaceable(out, force=True)):
        out.mkdir()
        (out / "old").write_text("1")
        _killed(out, "exchange")
        assert not out.exists()
        recover()
        assert (out / "old").read_text() == "1"
        check_replaceable(out, force=True)
        assert _names(tmp_path) == ["out"]
        (out / "old").unlink()
        for left in out.iterdir():
            left.unlink()
        out.rmdir()


def test_without_locks_nothing_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(atomic.fcntl, "flock", refused)
    (tmp_path / ".out.0123abcd.partial").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert _names(tmp_path) == [".out.0123abcd.partial", "out"]
