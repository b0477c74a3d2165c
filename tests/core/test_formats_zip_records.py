"""Zip archives as PyTorch writes them, and those that lie about themselves."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest

from supra_core.errors import FormatError
from supra_core.formats.pickle import zip_records
from supra_core.formats.pickle.zip_records import read_records


def archive(path: Path, names: tuple[str, ...] = ("a/data.pkl", "a/data/0")) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            file.writestr(name, name.encode() * 3)
    return path


def change(path: Path, old: bytes, new: bytes, count: int = -1) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, count))


def refused(path: Path) -> str:
    with pytest.raises(FormatError) as error:
        read_records(path)
    return str(error.value)


def test_records_are_where_the_library_finds_them(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip")
    content = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        for name, record in read_records(path).items():
            assert content[record.offset : record.offset + record.size] == file.read(name)
            assert record.crc == file.getinfo(name).CRC


def test_long_archives_and_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 10)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    path = tmp_path / "long.zip"
    with zipfile.ZipFile(path, "w", allowZip64=True) as file:
        for index in range(3):
            with file.open(f"a/{index}", "w", force_zip64=True) as entry:
                entry.write(b"x" * 20)
        file.comment = b"written by a test"
    content = path.read_bytes()
    assert b"PK\6\6" in content
    records = read_records(path)
    assert [content[r.offset : r.offset + r.size] for r in records.values()] == [b"x" * 20] * 3


def test_what_torch_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(5), "b": torch.ones(70_000)}, path)
    with zipfile.ZipFile(path) as file:
        assert read_records(path).keys() == {info.filename for info in file.infolist()}


@pytest.mark.parametrize("name", ["/etc/passwd", "../a", "a/../../b", "a\\b", ".."])
def test_names_that_lead_out(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a" * len(name), "x")
    change(path, b"a" * len(name), name.encode())
    assert "leaves its folder: refused" in refused(path)


def test_compressed_entries_do_not_unpack(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"\0" * 10**7)
    assert path.stat().st_size < 20_000
    assert "compressed or encrypted" in refused(path)


def test_an_entry_that_is_there_twice(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", ("a/1", "a/2"))
    change(path, b"a/2", b"a/1")
    assert "there twice" in refused(path)


def _directory(path: Path, entry: int, field: int, value: int) -> None:
    """Sets a 32-bit field of an entry in the directory."""
    content = bytearray(path.read_bytes())
    at = -1
    for _ in range(entry + 1):
        at = content.index(b"PK\1\2", at + 1)
    struct.pack_into("<L", content, at + field, value)
    path.write_bytes(content)


PACKED, SIZE, OFFSET = 20, 24, 42


def test_entries_that_overlap(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", ("a/1", "a/2"))
    for field in (PACKED, SIZE):
        _directory(path, 0, field, 40)
    assert "overlap: refused" in refused(path)


def test_two_names_for_one_record(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", ("a/1", "a/2"))
    _directory(path, 1, OFFSET, 0)
    assert "damaged zip entry a/2" in refused(path)


@pytest.mark.parametrize("value", [1, 2**31, 2**32 - 2, 2**32 - 1])
@pytest.mark.parametrize("field", [PACKED, SIZE, OFFSET])
def test_sizes_and_offsets_that_are_wrong(tmp_path: Path, field: int, value: int) -> None:
    path = archive(tmp_path / "a.zip")
    _directory(path, 1, field, value)
    refused(path)


def test_size_past_the_directory(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip")
    for field in (PACKED, SIZE):
        _directory(path, 1, field, 10_000)
    assert "truncated at a/data/0" in refused(path)


@pytest.mark.parametrize(("at", "code"), [(10, "<H"), (12, "<L"), (16, "<L")])
def test_a_directory_that_is_not_there(tmp_path: Path, at: int, code: str) -> None:
    path = archive(tmp_path / "a.zip")
    whole = path.read_bytes()
    end = whole.index(b"PK\5\6")
    for value in (0, 1, 0xFFFE, 0xFFFF, 2**31, 2**32 - 1):
        content = bytearray(whole)
        struct.pack_into(code, content, end + at, value & (0xFFFF if code == "<H" else 2**32 - 1))
        path.write_bytes(content)
        refused(path)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "a.zip")
    monkeypatch.setattr(zip_records, "RECORDS", 1)
    assert "refused" in refused(path)
    monkeypatch.setattr(zip_records, "RECORDS", 10)
    monkeypatch.setattr(zip_records, "DIRECTORY_BYTES", 50)
    assert "refused" in refused(path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip")
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path)
