"""Texts to tokens, and tokens to text as they come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from supra_core.text import ModelTokenizer, load_tokenizer
from tests.tiny_tokenizers import SPECIAL, byte_level, sentencepiece, with_bos

TOKENIZERS = {"sentencepiece": sentencepiece(), "byte_level": byte_level()}
WORDS = st.text("ab  é€😀\n", max_size=30)


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


def streamed(tokenizer: Tokenizer, ids: list[int], after: list[int] | None = None) -> list[str]:
    take = ModelTokenizer(tokenizer).stream(after or [])
    return [take(token) for token in ids]


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def test_a_continuation_keeps_its_first_space(tokenizer: Tokenizer) -> None:
    whole, before = (encoded(tokenizer, text) for text in ("hello world, all", "hello"))
    following = whole[len(before) :]
    assert whole[: len(before)] == before
    pieces = streamed(tokenizer, following, before)
    # The first piece is new text only, and nothing of the prompt.
    assert pieces[0] == " w"
    assert "".join(pieces) == " world, all"


def test_an_answer_begins_without_a_space() -> None:
    """Where the tokenizer's words bring one, a text by itself does not begin with it."""
    tokenizer = TOKENIZERS["sentencepiece"]
    answer = encoded(tokenizer, "world")
    assert tokenizer.id_to_token(answer[0]) == "▁w"
    assert "".join(streamed(tokenizer, answer)) == "world"
    # Nor does what comes after special tokens alone.
    assert "".join(streamed(tokenizer, answer, [1, 2])) == "world"


@given(WORDS, WORDS)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_the_rest_of_the_whole(name: str, prompt: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    before = encoded(tokenizer, prompt)
    following = encoded(tokenizer, text)
    shown, whole = (tokenizer.decode(ids) for ids in (before, [*before, *following]))
    assert "".join(streamed(tokenizer, following, before)) == whole[len(shown) :]
    assert "".join(streamed(tokenizer, following)) == tokenizer.decode(following)


def test_special_tokens_are_no_text(tokenizer: Tokenizer) -> None:
    ids = [*encoded(tokenizer, "a"), 2, 1, *encoded(tokenizer, "b")]
    said = "".join(streamed(tokenizer, ids, encoded(tokenizer, "c")))
    assert said.replace(" ", "") == "ab"


def test_a_prompt_that_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    """Nothing of such a prompt is repeated."""
    ids = encoded(tokenizer, "abc€")
    rest = encoded(tokenizer, "xyz")
    said = "".join(streamed(tokenizer, [*ids[-1:], *rest], ids[:-1]))
    assert said.lstrip("\ufffd").lstrip() == "xyz"


def test_a_long_run_of_bytes_before(tokenizer: Tokenizer) -> None:
    """What is decoded with the continuation begins with a character, wherever it is cut."""
    for length in range(1, 12):
        prompt, text = "a" + "€" * length, "é€ b"
        before = encoded(tokenizer, prompt)
        following = encoded(tokenizer, prompt + text)[len(before) :]
        assert "".join(streamed(tokenizer, following, before)) == text


def test_bytes_that_are_no_character_behind_one() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    stray, following = tokenizer.token_to_id("<0xE2>"), tokenizer.token_to_id("b")
    ids = [*encoded(tokenizer, "aé"), stray, following, following]
    # By itself the whole is taken for four bytes that are none; what was said is said.
    assert "".join(streamed(tokenizer, ids)) == "aé\ufffdbb"
    assert "".join(streamed(tokenizer, ids[-3:], ids[:-3])) == "\ufffdbb"


@given(st.lists(st.integers(0, 600), max_size=40), st.lists(st.integers(0, 600), max_size=40))
@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_tokens_are_too_strange(name: str, before: list[int], ids: list[int]) -> None:
    """Bytes that are no characters, in any order: what is certain is never taken back."""
    tokenizer = TOKENIZERS[name]
    size = tokenizer.get_vocab_size()
    before, ids = ([i % size for i in some] for some in (before, ids))
    end = encoded(tokenizer, "END")
    said = "".join(streamed(tokenizer, [*ids, *end], before))
    assert said.endswith("END")
    assert not any(marker in said for marker in SPECIAL)


def test_what_a_file_says_of_truncation_and_padding_is_left_out(tokenizer: Tokenizer) -> None:
    saved = Tokenizer.from_str(tokenizer.to_str())
    saved.enable_truncation(4)
    saved.enable_padding(length=9, pad_id=1)
    assert len(saved.encode("abcdef abc")) == 9
    loaded = load_tokenizer({"tokenizer.json": saved.to_str().encode()}, "the file")
    for text in ("abcdef abc", "a"):
        found = loaded.encode(text)
        assert found.ids.tolist() == encoded(tokenizer, text)
        assert found.ends[-1] == len(text)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_prompts_begin_as_the_tokenizer_begins_a_text(name: str) -> None:
    plain = TOKENIZERS[name]
    begun = with_bos(Tokenizer.from_str(plain.to_str()), SPECIAL[1])
    bos = plain.token_to_id(SPECIAL[1])
    ours, theirs = ModelTokenizer(plain), ModelTokenizer(begun)
    assert (ours.leading_ids, theirs.leading_ids) == ([], [bos])
    assert (ours.leading_form, theirs.leading_form) == (
        "no BOS", f"behind the tokenizer's own {SPECIAL[1]}"
    )  # fmt: skip
    for text in ("", "ab c", "x"):
        ids = encoded(plain, text)
        assert ours.encode_prompt(text) == ids
        # What the tokenizer puts behind a text is none of a prompt's.
        assert theirs.encode_prompt(text) == [bos, *ids] == begun.encode(text).ids[:-1]
    twice = SPECIAL[1] + "ab"
    assert theirs.encode_prompt(twice) == encoded(plain, twice)
    assert theirs.encode_prompt(twice).count(bos) == 1
    # Perplexity is of the text as it stands.
    assert theirs.encode("ab").ids.tolist() == encoded(plain, "ab")


@pytest.mark.parametrize("text", ["abc def", "x é€ 😀"])
def test_the_same_stretch_by_another_tokenizer(text: str) -> None:
    first, other = (ModelTokenizer(TOKENIZERS[n]) for n in ("byte_level", "sentencepiece"))
    whole = first.encode(text)
    for tokens in range(1, len(whole.ids) + 1):
        head = whole.head(tokens)
        same, alike = first.same_stretch(head)
        assert alike and same.ids.tolist() == head.ids.tolist()
        theirs, alike = other.same_stretch(head)
        assert not alike
        assert theirs.text == text[: head.ends[-1]]
        assert theirs.ids.tolist() == encoded(other.raw, theirs.text)
