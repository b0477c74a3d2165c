"""JSON of a stranger: bounded in size and depth, in time that its length bounds."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supra_core.errors import FormatError, SpecError, SupraError
from supra_core.families.shared.fields import Fields
from supra_core.formats.jsonfile import DEPTH, parse, read_object, unique


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(codec="utf-8")),
        st.lists,
        max_leaves=20,
    )
)
def test_what_is_shallow_is_read_as_ever(value: object) -> None:
    import json

    assert parse(json.dumps(value)) == value
    assert parse(json.dumps(value, ensure_ascii=False)) == value


def test_depth_is_counted_outside_strings() -> None:
    assert parse("[" * DEPTH + "]" * DEPTH) is not None
    for text in ("[" * (DEPTH + 1) + "]" * (DEPTH + 1), '{"a":' * 100 + "1" + "}" * 100):
        with pytest.raises(ValueError, match="levels deep"):
            parse(text)
    text = '["' + "[" * 1000 + '\\"' + "{" * 1000 + '"]'
    assert parse(text) == ["[" * 1000 + '"' + "{" * 1000]
    assert parse('["\\\\", ' + "[], " * 100 + "1]") is not None


@pytest.mark.parametrize(
    "text", ['"' + '\\"' * 500_000, '["' * 300_000, "[" * 10**6, "{" * 10**6, "\\" * 10**6]
)
def test_time_is_in_proportion(text: str) -> None:
    begin = time.process_time()
    with pytest.raises(ValueError):
        parse(text)
    assert time.process_time() - begin < 2


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, message in (
        (b"[" * 100_000, "levels deep"),
        (b"[1]", "must hold a JSON object"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": 1}' + b" " * 100, "larger than 50 bytes"),
        (b"", "not valid JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=message) as error:
            read_object(path, 50 if b"1}" in content else 10**7)
        assert len(str(error.value).splitlines()) == 1


def test_half_a_pair_is_no_character() -> None:
    assert parse('["\\ud83d\\ude00"]') == ["\U0001f600"]
    for text in ('["\\ud83d"]', '{"\\uDE00": 1}'):
        with pytest.raises(ValueError, match="surrogate"):
            parse(text)


def test_names_that_stand_twice() -> None:
    assert parse('{"a": {"a": 1}}', pairs=unique) == {"a": {"a": 1}}
    with pytest.raises(ValueError, match="twice"):
        parse('{"a": 1, "a": 2}', pairs=unique)


@pytest.mark.parametrize("value", [10**400, 1e999, float("nan"), float("inf"), -1, 0, True, "1"])
def test_numbers_that_are_none(value: object) -> None:
    fields = Fields({"a": value}, "c.json")
    for read in (fields.number, fields.integer):
        with pytest.raises(SpecError, match="field a must be"):
            read("a")


def test_token_ids_are_bounded() -> None:
    for value in (2**31, [2**31], list(range(1001)), 10**400):
        with pytest.raises(SpecError, match="field a must hold"):
            Fields({"a": value}, "c.json").tokens("a")


def test_a_message_is_one_line_whatever_a_file_says() -> None:
    message = str(SupraError("a\nb\x1b[2J\u2028c\u202ed\ud800" + "e" * 10**6))
    assert message.startswith("a\\nb\\x1b[2J\\u2028c\\u202ed\\ud800e")
    assert len(message) < 5000
    message.encode()
    assert str(SupraError("äöü 漢字 [1]")) == "äöü 漢字 [1]"
