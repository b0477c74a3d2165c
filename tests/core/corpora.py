"""Small corpora in every format, and a tokenizer of characters that shows what was read."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from supra_core.data import prepare
from supra_core.data.prepare import Settings
from supra_core.data.store import TokenStore
from supra_core.progress import silent

END = 1
TEXTS = [
    "Hello there.\nHow are you?",
    "x",
    "Zwei Zeilen,\n\nund noch eine: ä ö ü 😀\n",
    "a b " * 50,
]
CHARACTERS = sorted(set("".join(TEXTS)) | set("usertantsym:|\n"))
CHATML = (
    "{% for m in messages %}{% if m.role == 'zero' %}{{ 1 // 0 }}{% endif %}"
    "{% if m.role == 'none' %}{{ raise_exception('not this role') }}{% endif %}"
    "{{ m.role }}:{{ m.content }}|\n{% endfor %}"
)


def with_template(template: str) -> dict[str, bytes]:
    """The only file of a model that has it."""
    return {"tokenizer_config.json": json.dumps({"chat_template": template}).encode()}


def character_assets() -> dict[str, bytes]:
    """A tokenizer whose tokens are characters, unknown ones 0, and a template."""
    ids = {"<unk>": 0, "<end>": END} | {c: i + 2 for i, c in enumerate(CHARACTERS)}
    # The model has no embedding for it.
    ids["\u2603"] = len(ids)
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return {
        "tokenizer.json": tokenizer.to_str().encode(),
        **with_template(CHATML),
    }


ASSETS = character_assets()
VOCABULARY = len(CHARACTERS) + 2


def ids_of(text: str, *, end: bool = True) -> list[int]:
    ids = [CHARACTERS.index(c) + 2 if c in CHARACTERS else 0 for c in text]
    return [*ids, END] if end else ids


def prepared(*sources: str | Path, out: Path, **settings: Any) -> TokenStore:
    force = settings.pop("force", False)
    progress = settings.pop("progress", silent)
    chosen = {"separator": END, "vocab_size": VOCABULARY, **settings}
    told = Settings(tuple(map(str, sources)), **chosen)
    return prepare.prepare(told, ASSETS, out, force=force, progress=progress)


def split(store: TokenStore) -> list[list[int]]:
    """Every document's ids."""
    borders = [*store.documents(0, len(store)).tolist(), len(store)]
    return [store[a:b].tolist() for a, b in zip(borders, borders[1:], strict=False)]


def lines(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def write_texts(folder: Path) -> Path:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    return folder


def write_lines(folder: Path) -> Path:
    (folder / "d.jsonl").write_bytes(lines([{"text": text, "id": 3} for text in TEXTS]) + b"\n\n")
    return folder / "d.jsonl"


def write_gzip(folder: Path) -> Path:
    content = write_lines(folder).read_bytes()
    # Two members, as compressing in parallel makes them.
    (folder / "d.jsonl.gz").write_bytes(
        gzip.compress(content[:70], mtime=0) + gzip.compress(content[70:], mtime=0)
    )
    return folder / "d.jsonl.gz"


def write_zstandard(folder: Path) -> Path:
    codec = pytest.importorskip("pyarrow").Codec("zstd")
    content = write_lines(folder).read_bytes()
    frames = [codec.compress(part, asbytes=True) for part in (content[:70], content[70:])]
    (folder / "d.jsonl.zst").write_bytes(b"".join(frames))
    return folder / "d.jsonl.zst"


def write_parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    parquet.write_table(table, folder / "d.parquet", row_group_size=3)
    return folder / "d.parquet"


def write_archive(folder: Path) -> Path:
    with tarfile.open(folder / "d.tar", "w") as archive:
        for number, text in enumerate(TEXTS):
            name, content = f"{number}.txt", text.encode()
            if number % 2:
                name, content = f"{number}.json.gz", gzip.compress(lines([{"text": text}]), mtime=0)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder / "d.tar"


def as_archive(members: Mapping[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


TALK = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "n"}]
