"""tokenizer_config.json of a stranger: whatever its fields hold, an answer or one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

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
        for name, field in (("chat_template.json", "chat_template"), ("added_tokens.json", "<s>")):
            stated = {name: json.dumps({field: odd}).encode()}
            yield f"{name}: {odd!r:.60}", {"tokenizer.json": tokenizer, **stated}
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
