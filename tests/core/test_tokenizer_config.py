"""tokenizer_config.json of a stranger: whatever its fields hold, an answer or one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from supra_core.errors import SupraError
from supra_core.text.files import end_token, named_tokens, one_tokenizer, read_template

_ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 2**70, float("nan"), "", "x", "\x00", "a" * 100_000, [], [5], ["x"],
    [[]], [{}], [None], [{"name": 5}], [{"name": "default", "template": 5}],
    [{"name": [], "template": {}}], {}, {"a": 1}, {"content": 5}, {"content": []}, {"0": 5},
    {"x": {"content": "a"}}, {"0": {"content": 5}}, {"-1": {"content": "a"}},
    {"1" * 5000: {"content": "a"}}, {"0": []}, {"²": {"content": "a"}},
)  # fmt: skip
_FIELDS = (
    "chat_template", "added_tokens_decoder", "bos_token", "eos_token", "pad_token", "unk_token",
    "additional_special_tokens", "extra_special_tokens", "tokenizer_class", "model_max_length",
    "add_bos_token", "add_eos_token", "legacy", "auto_map", "clean_up_tokenization_spaces",
)  # fmt: skip


def _tokenizer() -> bytes:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return str(tokenizer.to_str()).encode()


def _cases() -> Iterator[tuple[str, Mapping[str, bytes]]]:
    tokenizer = _tokenizer()
    for content in (b"", b"{", b"5", b"[]", b"null", b"\xff", b'"x"', b"[" * 1000):
        for name in ("tokenizer_config.json", "chat_template.json", "special_tokens_map.json"):
            yield f"{name}: {content[:9]!r}", {"tokenizer.json": tokenizer, name: content}
    for field in _FIELDS:
        for odd in _ODD:
            for name in ("tokenizer_config.json", "special_tokens_map.json"):
                content = json.dumps({field: odd}).encode()
                yield f"{name}: {content[:60]!r}", {"tokenizer.json": tokenizer, name: content}
    for odd in _ODD:
        stated = {"chat_template.json": json.dumps({"chat_template": odd}).encode()}
        yield f"chat_template.json: {odd!r:.60}", {"tokenizer.json": tokenizer, **stated}
    yield "chat_template.jinja", {"tokenizer.json": tokenizer, "chat_template.jinja": b"\xff"}


@pytest.mark.parametrize("read", [read_template, named_tokens, end_token, one_tokenizer])
def test_any_value_of_any_field(read: Callable[[Mapping[str, bytes], str], object]) -> None:
    failed = []
    for case, assets in _cases():
        try:
            read(assets, "the model")
        except SupraError as error:
            if not str(error).startswith("the model"):
                failed.append(f"{case}: {error}")
        except Exception as error:
            failed.append(f"{case}: {type(error).__name__}: {str(error)[:80]}")
    assert failed == []


_PLAIN = {"special": True, "normalized": False, "lstrip": False, "rstrip": False}


@pytest.mark.parametrize(
    ("own", "config", "expected"),
    [
        # In the vocabulary, and named by another file alone: found whole.
        (None, {"eos_token": "<e>"}, ["a", "<e>", "b"]),
        (None, {"additional_special_tokens": ["<e>"]}, ["a", "<e>", "b"]),
        (None, {"added_tokens_decoder": {"2": {"content": "<e>", **_PLAIN}}}, ["a", "<e>", "b"]),
        (None, {}, ["a", "a", "a", "a", "b"]),
        # Stated twice: the decoder counts, a name alone changes nothing.
        (
            _PLAIN,
            {"added_tokens_decoder": {"2": {"content": "<e>", **_PLAIN, "lstrip": True}}},
            ["a", " <e>", "b"],
        ),
        ({**_PLAIN, "lstrip": True}, {"eos_token": "<e>"}, ["a", " <e>", "b"]),
    ],
)
def test_how_a_token_is_found(
    own: dict[str, bool] | None, config: dict[str, Any], expected: list[str]
) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<e>": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if own is not None:
        tokenizer.add_tokens([AddedToken("<e>", **own)])
    stated = {
        "tokenizer.json": str(tokenizer.to_str()).encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }
    made = one_tokenizer(stated, "the model")
    encoding = Tokenizer.from_str(made["tokenizer.json"].decode()).encode("a <e> b")
    assert ["a <e> b"[begin:end] if t == "<e>" else t for t, (begin, end) in zip(
        encoding.tokens, encoding.offsets, strict=True
    )] == expected  # fmt: skip


def test_the_file_that_gives_a_token_another_id_is_named() -> None:
    for name, stated in (
        ("added_tokens.json", {"<x>": 9}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": {"content": "<x>"}}}),
    ):
        assets = {"tokenizer.json": _tokenizer(), name: json.dumps(stated).encode()}
        with pytest.raises(SupraError, match=f"^the model: {name}.* gives '<x>' the id 9"):
            one_tokenizer(assets, "the model")
