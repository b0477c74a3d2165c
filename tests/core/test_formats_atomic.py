"""Outputs appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from supra_core.errors import SupraError
from supra_core.formats.atomic import atomic_file, atomic_folder, check_replaceable


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
