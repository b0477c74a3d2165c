"""Templates taken apart: the pieces put together again are what the template renders."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import pytest

from supra_core.errors import FormatError, SupraError
from supra_core.text.chat_template import ANSWER, ChatTemplate, Rendering
from supra_core.text.files import named_tokens, read_template
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
    turns = ChatTemplate(template, TOKENS).turns()
    assert (turns.opening, turns.to_answer, turns.to_user, turns.closing) == expected
    # Mistral's form puts a space before the answer, which the model says itself.
    space = " " if template == MISTRAL else ""
    said = (
        turns.opening + TALK[0]["content"] + turns.to_answer + space + TALK[1]["content"]
        + turns.to_user + TALK[2]["content"] + turns.to_answer + space + TALK[3]["content"]
        + turns.closing
    )  # fmt: skip
    assert said == ChatTemplate(template, TOKENS).render(TALK)


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
        ChatTemplate(template, TOKENS).turns()


def test_the_date_is_not_rendered() -> None:
    template = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + CHATML
    assert str(datetime.now(UTC).year) not in ChatTemplate(template, TOKENS).turns().opening


# As SmolLM3 and Granite 3.1 ask for the time: with nothing for where there is none.
UNCONDITIONAL = (
    '{%- set today = strftime_now("%d %B %Y") -%}Today: {{ today }}\n' + CHATML,
    "{% if messages[0].role != 'system' %}Today's Date: {{ strftime_now('%B %d, %Y') }}.\n"
    "{% endif %}" + CHATML,
)


@pytest.mark.parametrize("template", UNCONDITIONAL)
def test_a_template_that_must_have_a_date(template: str) -> None:
    turns = ChatTemplate(template, TOKENS).turns()
    assert "2025" in turns.opening and "January" in turns.opening and "01" in turns.opening
    plain = ChatTemplate(CHATML, TOKENS).turns()
    assert turns.opening.endswith(plain.opening)
    assert (turns.to_answer, turns.to_user) == (plain.to_answer, plain.to_user)
    said = ChatTemplate(template, TOKENS).render(TALK)
    assert said.startswith(turns.opening + "why?")


@pytest.mark.parametrize("rest", ["{{ nothing() }}", "{{ strftime_now.clock() }}"])
def test_what_else_is_undefined_is_still_an_error(rest: str) -> None:
    with pytest.raises(FormatError, match="cannot be rendered"):
        ChatTemplate(UNCONDITIONAL[0] + rest, TOKENS).turns()


def test_a_template_with_a_generation_block() -> None:
    template = CHATML.replace(
        "{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"
    )
    assert ChatTemplate(template, TOKENS).turns() == ChatTemplate(CHATML, TOKENS).turns()


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
    assert read_template({"tokenizer_config.json": config({"default": "d"})}, "x") == "d"
    other = {"chat_template.json": config("other"), "tokenizer_config.json": config("t")}
    assert read_template(other, "x") == "t"
    assert named_tokens(both, "x") == {"eos_token": "</s>"}
    with pytest.raises(FormatError, match="tokenizer_config.json is not valid JSON"):
        read_template({"tokenizer_config.json": b"{"}, "x")


# --- refusals, and answers that go on ---------------------------------------------------------

NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}[{{ m.content }}]{% endfor %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_refusal_is_told_as_one() -> None:
    with pytest.raises(FormatError) as told:
        ChatTemplate(NO_SYSTEM, {}).render([SYSTEM, *TALK])
    assert str(told.value) == (
        "the model's chat template refuses these messages: System role not supported; omit "
        "the system message"
    )
    with pytest.raises(FormatError, match="refuses these messages: roles must alternate$"):
        ChatTemplate(MISTRAL, TOKENS).render([TALK[0], TALK[0]])


@pytest.mark.parametrize(
    "program",
    [
        "{{ 1 // 0 }}", "{{ 1 / 0 }}", "{{ {}['a'].b }}", "{{ 'a' + 1 }}",
        "{{ (10 ** 400) / 3.0 }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ '%d' % 'a' }}", "{% include 'x' %}", "{{ messages | map(attribute='x.y') | sum }}",
        "{{ messages[0].content[::0] }}", "{{ none.x.y }}",
    ],
)  # fmt: skip
def test_whatever_a_template_runs_into_is_one_sentence(program: str) -> None:
    with pytest.raises(FormatError, match="cannot be rendered") as told:
        ChatTemplate(program, {}).render(TALK)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
@pytest.mark.parametrize("said", ["so far", "so far,\n", ""])
def test_an_answer_that_goes_on(template: str, said: str) -> None:
    chat = ChatTemplate(template, TOKENS)
    talk = [TALK[0], {"role": "assistant", "content": said}]
    asked = chat.render(TALK[:1], ANSWER)
    assert chat.render(talk, Rendering(continues=True)) == asked + said


def test_only_answers_go_on() -> None:
    chat = ChatTemplate(CHATML, TOKENS)
    for talk in ([TALK[0]], [], [{"role": "assistant", "content": None}]):
        with pytest.raises(SupraError, match="only an answer can be continued"):
            chat.render(talk, Rendering(continues=True))
    silent = ChatTemplate("{% for m in messages[:1] %}{{ m.content }}{% endfor %}", {})
    with pytest.raises(FormatError, match="cannot be continued"):
        silent.render(TALK[:2], Rendering(continues=True))


def test_variables_reach_the_template() -> None:
    program = "{% if think is defined and not think %}quick{% endif %}{{ bos_token }}"
    chat = ChatTemplate(program, TOKENS)
    assert chat.render(TALK) == "<s>"
    assert chat.render(TALK, Rendering(variables={"think": False})) == "quick<s>"


def test_a_time_that_is_told() -> None:
    chat = ChatTemplate(UNCONDITIONAL[0], TOKENS)
    assert chat.render(TALK, now=datetime(2019, 3, 7)).startswith("Today: 07 March 2019\n")


def test_tool_calls_are_shown_to_the_template() -> None:
    program = "{% for m in messages %}{{ m.content or m.tool_calls[0].function.name }};{% endfor %}"
    call = {"function": {"name": "look", "arguments": {"at": "it"}}}
    talk = [TALK[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert ChatTemplate(program, {}).render(talk) == "why?;look;"


def test_a_message_without_content_is_named_as_the_cause() -> None:
    talk = [TALK[0], {"role": "assistant", "content": None, "tool_calls": []}]
    with pytest.raises(FormatError, match="takes no message without content"):
        ChatTemplate("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", {}).render(talk)
    with pytest.raises(FormatError, match="cannot be rendered"):
        ChatTemplate("{{ 1 // 0 }}", {}).render(talk)
