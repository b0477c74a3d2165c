"""Templates taken apart: the pieces put together again are what the template renders."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from supra_core.chat_template import named_tokens, read_template, render, split_template
from supra_core.errors import FormatError
from tests.tiny_chat import CHATML, LLAMA3, MISTRAL

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    {"role": "user", "content": "why?"},
    {"role": "assistant", "content": "who asks?"},
    {"role": "user", "content": "i do."},
    {"role": "assistant", "content": "so."},
]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            CHATML,
            (
                "<|im_start|>system\nbe brief.<|im_end|>\n<|im_start|>user\n",
                "<|im_end|>\n<|im_start|>assistant\n",
                "<|im_end|>\n<|im_start|>user\n",
                "<|im_end|>\n",
            ),
        ),
        (
            LLAMA3,
            (
                "<s><|start_header_id|>user<|end_header_id|>\n\n",
                "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
                "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
                "<|eot_id|>",
            ),
        ),
        (MISTRAL, ("<s>[INST] ", " [/INST]", "</s>[INST] ", "</s>")),
    ],
    ids=["chatml", "llama3", "mistral"],
)
def test_the_strings_around_messages(template: str, expected: tuple[str, ...]) -> None:
    turns = split_template(template, TOKENS)
    assert (turns.opening, turns.to_answer, turns.to_user, turns.closing) == expected
    # Mistral's form puts a space before the answer, which the model says itself.
    space = " " if template == MISTRAL else ""
    said = (
        turns.opening + TALK[0]["content"] + turns.to_answer + space + TALK[1]["content"]
        + turns.to_user + TALK[2]["content"] + turns.to_answer + space + TALK[3]["content"]
        + turns.closing
    )  # fmt: skip
    assert said == render(template, TALK, answer_next=False, tokens=TOKENS)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}{{ m.content }}", "cannot be rendered"),
        ("{{ raise_exception('no chat today') }}", "no chat today"),
        ("{{ messages[0].content.nothing.more }}", "cannot be rendered"),
        ("{% for m in messages %}{{ m.content | upper }}.{% endfor %}", "as it is"),
        ("{% for m in messages %}{{ m.content * 2 }}.{% endfor %}", "as it is"),
        ("{% for m in messages %}{{ m.content }} {% endfor %}", "nothing between"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered"),
    ],
)
def test_templates_that_cannot_be_taken_apart(template: str, problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        split_template(template, TOKENS)


def test_the_date_is_not_rendered() -> None:
    template = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + CHATML
    assert str(datetime.now(UTC).year) not in split_template(template, TOKENS).opening


def test_a_template_with_a_generation_block() -> None:
    template = CHATML.replace(
        "{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"
    )
    assert split_template(template, TOKENS) == split_template(CHATML, TOKENS)


def test_where_templates_are_kept() -> None:
    def config(value: object) -> bytes:
        return json.dumps({"chat_template": value, "eos_token": {"content": "</s>"}}).encode()

    several = [{"name": "tools", "template": "a"}, {"name": "default", "template": "b"}]
    assert read_template({"tokenizer_config.json": config("t")}, "x") == "t"
    assert read_template({"tokenizer_config.json": config(several)}, "x") == "b"
    assert read_template({"tokenizer_config.json": config(None)}, "x") is None
    assert read_template({}, "x") is None
    both = {"chat_template.jinja": b"file", "tokenizer_config.json": config("t")}
    assert read_template(both, "x") == "file"
    assert named_tokens(both, "x") == {"eos_token": "</s>"}
    with pytest.raises(FormatError, match="tokenizer_config.json is not valid JSON"):
        read_template({"tokenizer_config.json": b"{"}, "x")
