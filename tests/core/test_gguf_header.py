"""GGUF headers that claim what is not there: refused at once, whatever the claim."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supra_core.errors import FormatError, SupraError
from supra_core.formats.gguf import header as gguf_header
from supra_core.formats.gguf import reader as gguf
from supra_core.formats.gguf.header import read_header
from supra_core.formats.gguf.tokenizer import tokenizer_assets

library = pytest.importorskip("gguf")

U8, U32, F32, STRING, LIST, U64 = 0, 4, 6, 8, 9, 10


def text(value: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if length is None else length) + value


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(
    name: bytes = b"t", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0
) -> bytes:
    extents = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + extents + struct.pack("<IQ", kind, offset)


def build(
    path: Path,
    entries: list[bytes] | tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
    data: bytes = b"\0" * 64,
    magic: bytes = b"GGUF",
) -> Path:
    stated = counts or (len(tensors), len(entries))
    head = magic + struct.pack("<IQQ", version, *stated) + b"".join((*entries, *tensors))
    path.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return path


def refused(path: Path) -> str:
    begin = time.process_time()
    with pytest.raises(FormatError) as error:
        read_header(path)
    assert time.process_time() - begin < 2
    assert len(str(error.value).splitlines()) == 1
    assert "truncated or damaged GGUF file" in str(error.value)
    return str(error.value)


def test_the_header_that_is_changed_below_is_read(tmp_path: Path) -> None:
    values = [
        entry(b"a", U32, struct.pack("<I", 7)),
        entry(b"b", STRING, text("é".encode())),
        entry(b"c", LIST, struct.pack("<IQ", STRING, 2) + text(b"x") + text(b"")),
        entry(b"d", LIST, struct.pack("<IQ", U8, 3) + b"\1\2\3"),
        entry(b"e", 7, b"\1"),
        entry(b"f", 12, struct.pack("<d", 0.5)),
    ]
    path = build(tmp_path / "a.gguf", values, (tensor(), tensor(b"u", (2, 3), 0, 32)))
    metadata, stored = read_header(path)
    assert metadata == {"a": 7, "b": "é", "c": ["x", ""], "d": [1, 2, 3], "e": True, "f": 0.5}
    assert {name: entry.shape for name, entry in stored.items()} == {"t": (4,), "u": (3, 2)}
    assert stored["u"].offset - stored["t"].offset == 32


@pytest.mark.model
def test_it_reads_what_the_library_reads(smollm2_gguf: Path) -> None:
    metadata, stored = read_header(smollm2_gguf)
    reader = library.GGUFReader(smollm2_gguf)
    theirs = {name: field.contents() for name, field in reader.fields.items()}
    assert metadata == {k: v for k, v in theirs.items() if not k.startswith("GGUF.")}
    assert len(stored) == len(reader.tensors)
    for found in reader.tensors:
        ours = stored[found.name]
        assert ours.offset == found.data_offset
        assert ours.kind == found.tensor_type
        assert ours.shape == tuple(reversed(found.shape.tolist()))
        if found.tensor_type.name not in ("F32", "F16"):
            assert ours.byte_shape == found.data.shape


EXTREMES = (2**16 + 1, 2**31 - 1, 2**32 - 1, 2**60, 2**63 - 1, 2**63, 2**64 - 1)


@pytest.mark.parametrize("claim", EXTREMES)
def test_a_small_file_that_claims_much(tmp_path: Path, claim: int) -> None:
    path = tmp_path / "a.gguf"
    short = struct.pack("<I", min(claim, 2**32 - 1))
    for entries, tensors, counts in (
        ((), (), (claim, 0)),
        ((), (), (0, claim)),
        ((text(b"key", claim),), (), (0, 1)),
        ((entry(b"k", STRING, text(b"x", claim)),), (), None),
        ((entry(b"k", LIST, struct.pack("<IQ", U8, claim)),), (), None),
        ((entry(b"k", LIST, struct.pack("<IQ", STRING, claim)),), (), None),
        ((entry(b"k", LIST, struct.pack("<IQ", STRING, 1) + text(b"x", claim)),), (), None),
        ((), (tensor(shape=(claim,)),), None),
        ((), (tensor(shape=(claim, claim, claim, claim)),), None),
        ((), (tensor(offset=claim - claim % 32),), None),
        ((), (text(b"t", claim),), None),
        ((), (text(b"t") + short + b"\0" * 32,), None),
        ((entry(b"general.alignment", U64, struct.pack("<Q", claim)),), (tensor(),), None),
    ):
        build(path, entries, tensors, counts=counts)
        assert path.stat().st_size < 300
        refused(path)


@pytest.mark.parametrize(
    ("entries", "tensors", "message"),
    [
        ((entry(b"k", 13, b""),), (), "unknown type 13"),
        ((entry(b"k", LIST, struct.pack("<IQ", LIST, 1)),), (), "a list of the unknown type 9"),
        ((entry(b"k", LIST, struct.pack("<IQ", 99, 1)),), (), "a list of the unknown type 99"),
        ((entry(b"k", STRING, text(b"\xff")),), (), "utf-8"),
        ((entry(b"k", U8, b"\1"), entry(b"k", U8, b"\1")), (), "k is there twice"),
        ((), (tensor(), tensor(offset=32)), "t is there twice"),
        ((), (tensor(), tensor(b"u")), "overlap"),
        ((), (tensor(), tensor(b"u", (4,), 0, 4)), "u is not aligned"),
        ((), (tensor(kind=200),), "200"),
        ((), (tensor(shape=(4,), kind=2),), "not a multiple of 32"),
        ((), (tensor(shape=(1, 1, 1, 1, 1)),), "has 5 axes"),
        ((), (tensor(shape=(17,)),), "ends past the file"),
        ((entry(b"general.alignment", U32, struct.pack("<I", 24)),), (), "not a power of two"),
        ((entry(b"general.alignment", U32, struct.pack("<I", 0)),), (), "not a power of two"),
        ((entry(b"general.alignment", STRING, text(b"32")),), (), "not a power of two"),
        ((entry(b"general.alignment", F32, struct.pack("<f", 32)),), (), "not a power of two"),
        ((entry(b"general.alignment", 7, b"\1"),), (), "not a power of two"),
    ],
)
def test_what_is_wrong_is_said(
    tmp_path: Path, entries: tuple[bytes, ...], tensors: tuple[bytes, ...], message: str
) -> None:
    assert message in refused(build(tmp_path / "a.gguf", entries, tensors))


def test_versions_and_truncations(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for version in (0, 1, 4):
        assert "version" in refused(build(path, version=version))
    for version in (2 << 24, 3 << 24):
        with pytest.raises(FormatError, match="is a big-endian GGUF file"):
            read_header(build(path, version=version))
    assert "does not begin" in refused(build(path, magic=b"GGML"))
    whole = build(path, [entry(b"k", STRING, text(b"x"))], (tensor(),), data=b"\0" * 16)
    content = whole.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path)


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [entry(b"k", LIST, struct.pack("<IQ", STRING, 2) + text(b"xx") + text(b"y"))]
    path = build(tmp_path / "a.gguf", values, (tensor(),))
    assert read_header(path)[0] == {"k": ["xx", "y"]}
    for name, value in (
        ("ENTRIES", 0), ("TENSORS", 0), ("LISTED", 1), ("LISTED_STRING_BYTES", 1),
        ("NAME_BYTES", 0), ("METADATA_BYTES", 30), ("RANK", 0),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(gguf_header, name, value)
            refused(path)


# --- metadata of the wrong type -------------------------------------------------------------


def _model(path: Path, **changes: bytes) -> Path:
    """A file of one layer whose entries may be replaced; its tensors come last and are absent."""
    number = lambda n: struct.pack("<II", U32, n)  # noqa: E731
    stated = {
        "general.architecture": struct.pack("<I", STRING) + text(b"llama"),
        "llama.block_count": number(1), "llama.context_length": number(64),
        "llama.embedding_length": number(8), "llama.feed_forward_length": number(16),
        "llama.attention.head_count": number(2), "llama.attention.head_count_kv": number(2),
        "llama.attention.layer_norm_rms_epsilon": struct.pack("<If", F32, 1e-5),
        "llama.vocab_size": number(16),
    } | {key.replace("__", "."): value for key, value in changes.items()}  # fmt: skip
    entries = [text(key.encode()) + value for key, value in stated.items()]
    return build(path, entries, (tensor(b"rope_freqs.weight", (2,)),))


WRONG = {
    "text": struct.pack("<I", STRING) + text(b"many"),
    "list": struct.pack("<IIQ", LIST, U8, 2) + b"\1\2",
    "empty list": struct.pack("<IIQ", LIST, U8, 0),
    "list of text": struct.pack("<IIQ", LIST, STRING, 2) + text(b"a") + text(b"b"),
    "nan": struct.pack("<If", F32, float("nan")),
    "infinity": struct.pack("<Id", 12, float("inf")),
    "huge": struct.pack("<IQ", U64, 2**63),
    "negative": struct.pack("<Ii", 5, -1),
    "zero": struct.pack("<II", U32, 0),
    "true": struct.pack("<I", 7) + b"\1",
}
KEYS = [
    "general.architecture", "llama.block_count", "llama.context_length", "llama.embedding_length",
    "llama.feed_forward_length", "llama.attention.head_count", "llama.attention.head_count_kv",
    "llama.attention.layer_norm_rms_epsilon", "llama.attention.key_length",
    "llama.attention.value_length", "llama.attention.sliding_window", "llama.rope.freq_base",
    "llama.rope.dimension_count", "llama.rope.scaling.type", "llama.rope.scaling.factor",
    "llama.rope.scaling.original_context_length", "llama.expert_count", "split.count",
    "llama.vocab_size", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id", "tokenizer.ggml.padding_token_id",
]  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("key", KEYS)
def test_metadata_of_another_type(tmp_path: Path, key: str, kind: str) -> None:
    path = _model(tmp_path / "a.gguf", **{key: WRONG[kind]})
    with pytest.raises(SupraError) as error:
        gguf.read(path)
    assert len(str(error.value).splitlines()) == 1


TOKENS: dict[str, Any] = {
    "general.architecture": "llama",
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": ["a", "b", "ab"],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.token_type": [1, 1, 1],
    "tokenizer.ggml.eos_token_id": 0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"ggml.tokens": "abc"}, {"ggml.tokens": [1, 2, 3]}, {"ggml.tokens": 7},
        {"ggml.merges": [["a", "b"]]}, {"ggml.merges": "a b"}, {"ggml.merges": ["ab"]},
        {"ggml.merges": ["a z"]}, {"ggml.token_type": [1]}, {"ggml.token_type": ["1"] * 3},
        {"ggml.scores": [0.0]}, {"ggml.eos_token_id": 3}, {"ggml.eos_token_id": -1},
        {"ggml.bos_token_id": "0"}, {"ggml.unknown_token_id": True}, {"ggml.model": 7},
        {"ggml.model": "unknown"}, {"chat_template": 7}, {"ggml.add_bos_token": 1},
    ],
)  # fmt: skip
def test_tokenizers_that_are_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    spec = __import__("tests.tiny_models", fromlist=["SPECS"]).SPECS["transformer"]
    path = tmp_path / "a.gguf"
    assert "tokenizer.json" in tokenizer_assets(path, TOKENS, spec)
    metadata = {**TOKENS, **{f"tokenizer.{key}": value for key, value in changes.items()}}
    with pytest.raises(FormatError) as error:
        tokenizer_assets(path, metadata, spec)
    assert len(str(error.value).splitlines()) == 1


def test_divisors_of_frequencies(tmp_path: Path) -> None:
    for divisors in ([0, 0], [np.nan, 1], [np.inf, 1], [-1, 2]):
        path = _model(tmp_path / "a.gguf")
        content = path.read_bytes()
        path.write_bytes(content[:-64] + np.array(divisors, np.float32).tobytes() + b"\0" * 56)
        with pytest.raises(FormatError, match="positive, finite numbers"):
            gguf.read(path)
    for key, value in {"llama.attention.key_length": 2**31}.items():
        with pytest.raises(FormatError, match="must be a float32 for each pair"):
            gguf.read(_model(tmp_path / "a.gguf", **{key: struct.pack("<II", U32, value)}))
