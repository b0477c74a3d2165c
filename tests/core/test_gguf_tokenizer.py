"""GGUF tokenizers: each statement of the file is followed as llama.cpp does, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers

from supra_core.errors import FormatError
from supra_core.formats.gguf.pretokenizers import PRE_TOKENIZERS
from supra_core.formats.gguf.tokenizer import tokenizer_assets, tokenizer_notes
from tests.tiny_models import SPECS

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPACE, LINE = "\u0120", "\u010a"
MERGES = [
    ("1", "2"), ("3", "4"), ("12", "3"), ("12", "34"), (LINE, LINE), (SPACE, "a"), ("a", "b"),
    ("'", "S"), (SPACE, SPACE), ("x", "!"),
]  # fmt: skip
ADDED = ["<s>", "</s>", "<\uff5cUser\uff5c>", "<think>"]
BYTES: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [*ADDED, *ALPHABET, *("".join(pair) for pair in MERGES)],
    "tokenizer.ggml.token_type": [3, 3, 3, 4, *[1] * (len(ALPHABET) + len(MERGES))],
    "tokenizer.ggml.merges": [" ".join(pair) for pair in MERGES],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}
PIECES: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [
        "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581", "A", "b", "\u2581A", "bb", "<tool>",
    ],
    "tokenizer.ggml.scores": [0.0] * 259 + [-9.0, -8.0, -7.0, -1.0, -2.0, 0.0],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1, 4],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}  # fmt: skip


def _built(metadata: dict[str, Any], **changes: Any) -> Tokenizer:
    stated = {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
    stated = {key: value for key, value in stated.items() if value is not None}
    files = tokenizer_assets(Path("m.gguf"), stated, SPECS["transformer"])
    return Tokenizer.from_str(files["tokenizer.json"].decode())


def _tokens(tokenizer: Tokenizer, text: str) -> list[str]:
    found: list[str] = tokenizer.encode(text, add_special_tokens=False).tokens
    return found


# Text -> tokens, by the name that a file states.
DIVIDED: dict[str, dict[str, list[str]]] = {
    "gpt-2": {"1234": ["1234"], "\n\n1": [LINE, LINE, "1"], "a'S": ["a", "'", "S"]},
    "smollm": {"1234": ["1", "2", "3", "4"], "\n\n1": [LINE * 2, "1"]},
    "llama-bpe": {"1234": ["123", "4"], "\n\n1": [LINE * 2, "1"], "a'S": ["a", "'S"]},
    "smaug-bpe": {"1234": ["123", "4"], "a'S": ["a", "'S"]},
    "qwen2": {"1234": ["1", "2", "3", "4"], "\n\n1": [LINE * 2, "1"], "a'S": ["a", "'S"]},
    "megrez": {"1234": ["1", "2", "3", "4"]},
    "tekken": {"1234": ["1", "2", "3", "4"], "aAb": ["a", "A", "b"], "ab": ["ab"]},
    "default": {"1234": ["123", "4"], "x!": ["x", "!"]},
    "deepseek-llm": {"1234": ["1234"], "\n\n1": [LINE, LINE, "1"]},
    "deepseek-coder": {"1234": ["1", "2", "3", "4"]},
    "deepseek-v3": {"1234": ["123", "4"]},
    "falcon": {"1234": ["123", "4"], "x!": ["x", "!"]},
}  # fmt: skip


@pytest.mark.parametrize("name", DIVIDED)
def test_texts_are_divided_as_the_file_states(name: str) -> None:
    tokenizer = _built(BYTES, pre=name)
    for text, tokens in DIVIDED[name].items():
        assert _tokens(tokenizer, text) == tokens, text
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_name_builds_and_loses_nothing(name: str) -> None:
    text = "I'LL  go\n\n1. 12345 \u00dcber x=3.14;\t\u6f22\u5b57 <think>'s"
    tokenizer = _built(BYTES, pre=name)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids) == text


def test_a_piece_that_is_a_token_ignores_the_merges() -> None:
    tokens = [*BYTES["tokenizer.ggml.tokens"], "xyz"]
    changes = {"tokens": tokens, "token_type": [*BYTES["tokenizer.ggml.token_type"], 1]}
    assert _tokens(_built(BYTES, pre="llama-bpe", **changes), "xyz") == ["xyz"]
    assert _tokens(_built(BYTES, pre="qwen2", **changes), "xyz") == ["x", "y", "z"]


def test_whole_tokens_and_their_ids() -> None:
    """Control tokens in letters that no byte has, as DeepSeek's, and user-defined ones."""
    tokenizer = _built(BYTES)
    assert _tokens(tokenizer, "a<\uff5cUser\uff5c>b<think>") == ["a", ADDED[2], "b", ADDED[3]]
    assert [tokenizer.token_to_id(token) for token in ADDED] == [0, 1, 2, 3]
    ids = tokenizer.encode("a<\uff5cUser\uff5c>b<think>").ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab<think>"


def test_ends_that_a_file_calls_plain_tokens() -> None:
    ends = ["<|im_end|>", "<|over|>", "<|plain|>"]
    tokens = [*BYTES["tokenizer.ggml.tokens"], *ends]
    kinds = [*BYTES["tokenizer.ggml.token_type"], 1, 1, 1]
    eot = {"eot_token_id": len(tokens) - 2}
    tokenizer = _built(BYTES, tokens=tokens, token_type=kinds, **eot)
    assert _tokens(tokenizer, "a<|im_end|><|over|>") == ["a", *ends[:2]]
    assert len(_tokens(tokenizer, "<|plain|>")) > 1


@pytest.mark.parametrize(
    ("prefix", "text", "tokens"),
    [
        (None, "A bb", ["\u2581A", "\u2581", "bb"]),
        (True, "A bb", ["\u2581A", "\u2581", "bb"]),
        (True, " A", ["\u2581", "\u2581A"]),
        (True, "b<tool>A", ["\u2581", "b", "<tool>", "\u2581A"]),
        (False, "A bb", ["A", "\u2581", "bb"]),
        (False, " A", ["\u2581A"]),
        (False, "b<tool>A", ["b", "<tool>", "A"]),
        (False, "\u00e9", ["<0xC3>", "<0xA9>"]),
    ],
)
def test_space_before_a_text(prefix: bool | None, text: str, tokens: list[str]) -> None:
    tokenizer = _built(PIECES, add_space_prefix=prefix)
    assert _tokens(tokenizer, text) == tokens
    if "<tool>" not in text:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("metadata", "changes", "ids"),
    [
        (PIECES, {}, [1]),
        (PIECES, {"add_bos_token": False}, []),
        (PIECES, {"add_eos_token": True}, [1, 2]),
        (BYTES, {}, []),
        (BYTES, {"add_bos_token": True}, [0]),
        (BYTES, {"add_eos_token": True}, [1]),
        (BYTES, {"add_eos_token": True, "add_bos_token": True, "bos_token_id": 1}, [1, 1]),
        (BYTES, {"pre": "llama-bpe"}, [0]),
        (BYTES, {"pre": "tekken", "add_bos_token": False}, []),
    ],
)
def test_what_is_added_around_a_text(
    metadata: dict[str, Any], changes: dict[str, Any], ids: list[int], tmp_path: Path
) -> None:
    assert _built(metadata, **changes).encode("").ids == ids
    transformers = pytest.importorskip("transformers")
    stated = {**metadata, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}
    for name, content in tokenizer_assets(tmp_path, stated, SPECS["transformer"]).items():
        (tmp_path / name).write_bytes(content)
    assert transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)("").input_ids == ids


@pytest.mark.parametrize(
    ("metadata", "changes", "message"),
    [
        (BYTES, {"pre": "harbour-bpe"}, "pre is 'harbour-bpe', which is not supported: convert"),
        (BYTES, {"model": "t5"}, "model is 't5' instead of 'gpt2' or 'llama', which is not"),
        (BYTES, {"model": None}, "model is None instead of 'gpt2'"),
        (BYTES, {"merges": None}, "merges is missing, which tokenizer.ggml.model 'gpt2' needs"),
        (PIECES, {"scores": None}, "scores is missing, which tokenizer.ggml.model 'llama' needs"),
        (BYTES, {"add_space_prefix": True}, "add_space_prefix is true beside"),
        (PIECES, {"remove_extra_whitespaces": True}, "remove_extra_whitespaces is true beside"),
        (BYTES, {"add_sep_token": True}, "add_sep_token is true beside"),
        (PIECES, {"precompiled_charsmap": [1]}, "precompiled_charsmap is stated"),
        (PIECES, {"bos_token_id": None}, "bos_token_id is missing, though"),
        (BYTES, {"eot_token_id": 10**6}, "eot_token_id is not an id among"),
        (BYTES, {"eos_token_id": None, "add_eos_token": True}, "eos_token_id is missing, though"),
        (BYTES, {"tokens": ["a"] * 4, "token_type": None}, "a token is there twice"),
        (BYTES, {"merges": ["ab"]}, "the merge 'ab' has one part"),
    ],
)
def test_what_is_refused(metadata: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError) as error:
        _built(metadata, **changes)
    assert message in str(error.value)
    assert str(error.value).startswith("m.gguf")


def test_notes() -> None:
    path = Path("m.gguf")
    assert tokenizer_notes(path, BYTES) == tokenizer_notes(path, PIECES) == ()
    (note,) = tokenizer_notes(path, {**BYTES, "tokenizer.ggml.pre": ""})
    assert "does not state tokenizer.ggml.pre" in note
    assert tokenizer_notes(path, {}) == ()
    assert _tokens(_built(BYTES, pre=None), "1234") == ["123", "4"]
