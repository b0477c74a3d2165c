"""Templates taken apart: the pieces put together again are what the template renders."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from supra_core.chat_template import (
    FIXED_TIME,
    _environment,
    named_tokens,
    read_template,
    render,
    split_template,
    with_time,
)
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


# As SmolLM3 and Granite 3.1 ask for the time: with nothing for where there is none.
UNCONDITIONAL = (
    '{%- set today = strftime_now("%d %B %Y") -%}Today: {{ today }}\n' + CHATML,
    "{% if messages[0].role != 'system' %}Today's Date: {{ strftime_now('%B %d, %Y') }}.\n"
    "{% endif %}" + CHATML,
)


@pytest.mark.parametrize("template", UNCONDITIONAL)
def test_a_template_that_must_have_a_date(template: str) -> None:
    turns = split_template(template, TOKENS)
    assert "2025" in turns.opening and "January" in turns.opening and "01" in turns.opening
    plain = split_template(CHATML, TOKENS)
    assert turns.opening.endswith(plain.opening)
    assert (turns.to_answer, turns.to_user) == (plain.to_answer, plain.to_user)
    said = render(template, TALK, answer_next=False, tokens=TOKENS)
    assert said.startswith(turns.opening + "why?")


@pytest.mark.parametrize("rest", ["{{ nothing() }}", "{{ strftime_now.clock() }}"])
def test_what_else_is_undefined_is_still_an_error(rest: str) -> None:
    with pytest.raises(FormatError, match="cannot be rendered"):
        split_template(UNCONDITIONAL[0] + rest, TOKENS)


@pytest.mark.parametrize(
    "call",
    [
        "strftime_now('%d %b %Y')", 'strftime_now("%Y-%m-%d")', "strftime_now(format='%H:%M')",
        "strftime_now( '%d' )", 'strftime_now("it\'s %A")', "strftime_now('%%d')",
        "strftime_now('')", "strftime_now('a') ~ strftime_now('%Y')",
    ],
)  # fmt: skip
def test_a_time_that_is_written_is_the_time_that_is_told(call: str) -> None:
    """The template with the time in it renders as the template that is given a clock."""
    template = "{% if strftime_now is defined %}[{{ " + call + " }}]{% endif %}"
    written = with_time(template, FIXED_TIME)
    # What is left to call would show another day.
    told = _environment().from_string(template).render(strftime_now=FIXED_TIME.strftime)
    other = _environment().from_string(written).render(strftime_now=lambda format: "another")
    assert other == told != ""


def test_what_a_time_is_not_written_into() -> None:
    for template in (
        "{{ strftime_now(form) }}",
        "{{ strftime_now }}",
        "{{ my_strftime_now('%d') }}",
    ):
        assert with_time(template, FIXED_TIME) == template


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
