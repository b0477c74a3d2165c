"""Rows fed by hand: what becomes of the tokens that a model might say."""

from __future__ import annotations

import itertools

import pytest

from supra_core.data.synthesis.rows import (
    ConversationRow,
    DocumentRow,
    Part,
    Row,
    Script,
    Vocabulary,
    fault,
    loops,
    vocabulary,
)
from supra_core.errors import FormatError
from supra_core.text import ModelTokenizer
from supra_core.text.chat_template import ChatTemplate
from tests.tiny_chat import CHATML, MISTRAL, SPECIAL, tokenizer

END, IM_START, IM_END, BOS, EOS = range(5)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def words(
    template: str | None = CHATML, bos: int | None = IM_START, eos: int = IM_END
) -> Vocabulary:
    turns = None if template is None else ChatTemplate(template, TOKENS).turns()
    return vocabulary(ModelTokenizer(tokenizer()), bos, (eos,), turns, "model")


def conversation(template: str = CHATML, most: int = 2) -> ConversationRow:
    known = words() if template == CHATML else words(template, BOS, EOS)
    return ConversationRow(Script(known, ChatTemplate(template, TOKENS).turns(), most))


def say(row: Row, said: str) -> str:
    """Let the row hear ``said`` from the model; what was fed to the model, as text."""
    known, fed = words(), []
    wanted = known.encode(said)
    while wanted and not row.done:
        # A token is the model's if the row would feed it; what the template adds comes first.
        before = row._sampled if isinstance(row, ConversationRow) else 0
        token = row.next(wanted[0])
        if not isinstance(row, ConversationRow) or row._sampled > before:
            wanted.pop(0)
        if token is not None:
            fed.append(token)
    return known.decode(fed)


def test_documents_begin_where_the_models_texts_begin() -> None:
    # The chat model's bos opens turns: its texts begin after the end of another.
    assert (words().start, words().end, words().ends) == (END, END, {END, IM_END, EOS})
    plain = words(None, BOS, EOS)
    assert (plain.start, plain.end) == (BOS, END)
    assert (words(None, None, EOS).start, words(MISTRAL, BOS, EOS).start) == (END, BOS)


def test_a_text_needs_an_end() -> None:
    from tokenizers import Tokenizer, models

    with pytest.raises(FormatError, match="eos_token_id"):
        vocabulary(ModelTokenizer(Tokenizer(models.BPE({"a": 0}, []))), None, (), None, "model")


def test_a_document_ends_with_its_end_and_else_is_cut() -> None:
    whole, cut = DocumentRow(words()), DocumentRow(words(None, BOS, EOS))
    assert say(whole, "once upon<|endoftext|>more") == "once upon"
    assert whole.done
    sample = whole.sample()
    assert (sample.text, sample.finished, sample.dropped) == ("once upon<|endoftext|>", True, "")
    assert (sample.tokens, sample.sampled) == (10, 10)
    say(cut, "once")
    sample = cut.sample()
    assert (sample.text, sample.finished) == ("<s>once<|endoftext|>", False)
    assert (sample.tokens, sample.sampled) == (6, 4)


def test_a_conversation_by_the_template() -> None:
    row = conversation()
    fed = say(row, "why?<|im_end|>so.<|im_end|>and?<|endoftext|>no.<|im_end|>")
    assert row.done
    sample = row.sample()
    expected = (
        "<|im_start|>system\nbe brief.<|im_end|>\n<|im_start|>user\nwhy?<|im_end|>\n"
        "<|im_start|>assistant\nso.<|im_end|>\n<|im_start|>user\nand?<|im_end|>\n"
        "<|im_start|>assistant\nno.<|im_end|>\n<|endoftext|>"
    )
    assert sample.text == expected
    # The model has read what is written: all but the opening, and what follows its last word.
    assert fed in expected
    assert fed.startswith("why?") and fed.endswith("no.")
    assert sample.messages == [
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "so."},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "no."},
    ]
    assert (sample.finished, sample.dropped, sample.sampled) == (True, "", 18)


def test_a_conversation_whose_marks_are_plain_text() -> None:
    row = conversation(MISTRAL)
    # The user's end is spelled out by the model; the answer's is a token.
    fed = say(row, " why? [/INST] so.</s> and? [/INST] no.</s>")
    sample = row.sample()
    expected = "<s>[INST] why? [/INST] so.</s>[INST] and? [/INST] no.</s><|endoftext|>"
    assert row.done
    assert sample.text.replace("  [", " [") == expected
    assert fed == " why? [/INST] so.</s>[INST] and? [/INST] no."
    assert [message["content"] for message in sample.messages or []] == [
        "why?", "so.", "and?", "no.",
    ]  # fmt: skip
    assert sample.finished


@pytest.mark.parametrize(
    ("said", "messages", "finished", "dropped"),
    [
        ("", 0, False, "no answer"),
        ("why?", 0, False, "no answer"),
        ("why?<|im_end|>", 0, False, "no answer"),
        (" \n<|im_end|>", 0, False, "no answer"),
        ("why?<|im_end|>  <|im_end|>", 2, True, "empty"),
        ("why?<|im_end|>bec", 2, False, ""),
        ("why?<|im_end|>so.<|im_end|>", 2, True, ""),
        ("why?<|im_end|>so.<|im_end|>an", 2, True, ""),
        ("why?<|im_end|>so.<|im_end|>and?<|im_end|>", 2, True, ""),
        ("why?<|im_end|>so.<|im_end|><|im_end|>", 2, True, ""),
        ("why?<|im_end|>so.<|im_end|>and?<|im_end|> <|im_end|>", 2, True, ""),
        ("why?<|im_end|>so.<|im_end|>and?<|im_end|>n", 4, False, ""),
        ("why?<|im_end|>" + "ha " * 30, 2, False, "loop"),
    ],
)
def test_conversations_that_stop_early(
    said: str, messages: int, finished: bool, dropped: str
) -> None:
    row = conversation()
    say(row, said)
    sample = row.sample()
    assert len(sample.messages or []) == messages
    assert (sample.finished, sample.dropped) == (finished, dropped)
    assert sample.text.endswith(SPECIAL[END])
    if not dropped:
        assert sample.text.count("<|im_start|>assistant\n") == messages / 2


def test_faults() -> None:
    def of(text: str) -> str:
        return fault(Part(tuple(words().encode(text)), text, True), words())

    assert of("a text of some length, in which nothing much comes again.") == ""
    assert of(" \n\n ") == of("") == "empty"
    assert of("so on and " * 10) == "loop"
    # Spelled in plain tokens, as a text it would be the special one.
    assert fault(Part((10, 11), "he said </s>", True), words()) == "marker"


def test_loops() -> None:
    varied = list(range(300))
    assert not loops(varied)
    assert not loops([7] * 23)
    assert loops([7] * 24)
    # A loop at the end, of any period that fits the stretch several times.
    for period in (1, 3, 16, 30):
        circle = list(itertools.islice(itertools.cycle(range(1000, 1000 + period)), 128))
        assert loops(varied + circle), period
        assert loops(circle + varied), period
    # A table's rows share some tokens, not whole pieces.
    assert not loops([token for n in range(60) for token in (1, 2, 100 + n, 3, 200 + n % 7)])
    # Something said twice is no loop.
    assert not loops(varied[:100] * 2)
