"""Conversations as clients send them, log-probabilities as they get them, and pages in browsers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("jinja2")

from supra_cli.serving.logprobs import Echo as Echoed  # noqa: E402
from supra_core.runtime.engine import Message  # noqa: E402
from supra_core.text.chat_template import ANSWER, ChatTemplate, Rendering  # noqa: E402
from tests.cli.served import PLACE, Served  # noqa: E402
from tests.core.echo import Echo  # noqa: E402

CHAT = "/v1/chat/completions"
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if mood %}[{{ mood }}]{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
WITH_TOOLS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "CALL {{ c.function.name }} {{ c.function.arguments ARGUMENTS }}{% endfor %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_CALLS = WITH_TOOLS.replace("m.tool_calls or []", "[]")
NO_RESULTS = WITH_TOOLS.replace("m.content or ''", "m.content or '' if m.role != 'tool' else ''")
REFUSING = (
    "{% if messages[-1].role == 'tool' %}{{ raise_exception('only people') }}{% endif %}" + PLAIN
)


class Templated(Echo):
    """Renders by a chat template, and keeps the text."""

    def __init__(self, template: str) -> None:
        super().__init__()
        self._template = ChatTemplate(template, {})
        self.rendered: list[str] = []

    def render(
        self, messages: Sequence[Message], now: datetime | None = None, how: Rendering = ANSWER
    ) -> list[int]:
        self.rendered.append(self._template.render(messages, how, now))
        return self.encode(self.rendered[-1])


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Templated:
    return Templated(getattr(request, "param", PLAIN))


@pytest.fixture
def served(engine: Templated) -> Iterator[Served]:
    running = Served(engine)
    yield running
    running.close()


def ask(served: Served, *messages: dict[str, Any], **more: Any) -> Any:
    return served.post(CHAT, {"messages": messages, "max_tokens": 3, **more})


def say(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED = (say("user", "Why?"), say("assistant", "Since"))
CLOSED = "<user>Why?</><assistant>Since</>"


@pytest.mark.parametrize(
    ("messages", "fields", "text"),
    [
        (ASKED[:1], {}, "<user>Why?</><assistant>"),
        (ASKED[:1], {"add_generation_prompt": False}, "<user>Why?</>"),
        (ASKED, {}, "<user>Why?</><assistant>Since"),
        (ASKED, {"continue_final_message": True}, "<user>Why?</><assistant>Since"),
        (ASKED, {"add_generation_prompt": False}, "<user>Why?</><assistant>Since"),
        (ASKED, {"continue_final_message": True, "add_generation_prompt": False},
         "<user>Why?</><assistant>Since"),
        (ASKED, {"add_generation_prompt": True}, CLOSED + "<assistant>"),
        (ASKED, {"continue_final_message": False}, CLOSED + "<assistant>"),
        (ASKED, {"continue_final_message": False, "add_generation_prompt": False}, CLOSED),
        ((*ASKED, say("user", "So")), {}, CLOSED + "<user>So</><assistant>"),
        (ASKED[:1], {"chat_template_kwargs": {"mood": "good"}}, "<user>Why?</>[good]<assistant>"),
        ((say("developer", "x", name="me"),), {}, "<system>x</><assistant>"),
        ((say("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),), {},
         "<user>a\nb</><assistant>"),
        # As OpenAI's client gives an answer back.
        ((ASKED[0], say("assistant", "Since", refusal=None, annotations=[], audio=None,
                        function_call=None, tool_calls=None), say("user", "So")), {},
         CLOSED + "<user>So</><assistant>"),
    ],
)  # fmt: skip
def test_where_the_answer_begins(
    served: Served, engine: Templated, messages: Any, fields: Any, text: str
) -> None:
    answer = ask(served, *messages, **fields)
    assert answer.status_code == 200, answer.text
    assert engine.rendered == [text]
    # What goes on from a text is no new one, at whose beginning a space may be dropped.
    assert engine.continued == [text.endswith("Since")]


@pytest.mark.parametrize(
    ("messages", "fields", "says"),
    [
        (ASKED, {"continue_final_message": True, "add_generation_prompt": True}, "contradict"),
        (ASKED[:1], {"continue_final_message": True}, "continue_final_message needs"),
        ((say("assistant", None),), {}, "messages.0.content: must be text"),
        ((say("user", None, tool_calls=[]),), {}, "messages.0.content: must be text"),
        ((say("user", "x", prefix=True),), {}, "messages.0.prefix: is unknown"),
    ],
)  # fmt: skip
def test_what_contradicts_itself(
    served: Served, engine: Templated, messages: Any, fields: Any, says: str
) -> None:
    answer = ask(served, *messages, **fields)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]
    assert not engine.rendered


CALL = {"id": "1", "type": "function", "function": {"name": "tide", "arguments": '{"at": null}'}}
TOOLS = (
    say("user", "Tide?"), say("assistant", None, tool_calls=[CALL]),
    say("tool", "low", tool_call_id="1"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "arguments"),
    [
        # Some templates write the object as JSON, others expect it as text.
        (WITH_TOOLS.replace("ARGUMENTS", "| tojson"), '{"at": null}'),
        (WITH_TOOLS.replace("c.function.arguments ARGUMENTS", "'=' + c.function.arguments"),
         '={"at": null}'),
    ],
    indirect=["engine"],
)  # fmt: skip
def test_tools_in_earlier_messages(served: Served, engine: Templated, arguments: str) -> None:
    answer = ask(served, *TOOLS)
    assert answer.status_code == 200, answer.text
    text = f"<user>Tide?</><assistant>CALL tide {arguments}</><tool>low</><assistant>"
    assert text in engine.rendered
    assert answer.json()["usage"]["prompt_tokens"] == len(text)


@pytest.mark.parametrize(
    ("engine", "messages"),
    [
        (NO_CALLS, TOOLS), (NO_RESULTS.replace("ARGUMENTS", ""), TOOLS), (REFUSING, TOOLS),
        (PLAIN, TOOLS), (WITH_TOOLS.replace("ARGUMENTS", ""), TOOLS[:2]),
        (NO_CALLS, (TOOLS[0], say("assistant", "Low", tool_calls=[CALL]), say("user", "So?"))),
    ],
    indirect=["engine"],
)  # fmt: skip
def test_tools_that_the_template_has_no_place_for(served: Served, messages: Any) -> None:
    answer = ask(served, *messages)
    assert answer.status_code == 400
    assert "tools" in answer.json()["error"]["message"]


@pytest.mark.parametrize("arguments", ["", "low", "[1]", 5])
def test_arguments_that_are_no_object(served: Served, arguments: Any) -> None:
    call = {"function": {"name": "tide", "arguments": arguments}}
    answer = ask(served, TOOLS[0], say("assistant", None, tool_calls=[call]), TOOLS[2])
    assert answer.json()["error"]["param"] == "messages.1.tool_calls.0.function.arguments"


PAGE = "http://localhost:3000"
PREFLIGHT = {
    "Origin": PAGE, "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
}  # fmt: skip


@pytest.mark.parametrize(
    ("origins", "origin", "allowed"),
    [
        ((), PAGE, None), ((PAGE,), PAGE, PAGE), ((PAGE,), "http://other.example", None),
        (("http://other.example", PAGE), PAGE, PAGE), (("*",), PAGE, "*"),
        (("null",), "null", "null"),
    ],
)  # fmt: skip
def test_pages_of_other_origins(
    engine: Templated, origins: tuple[str, ...], origin: str, allowed: str | None
) -> None:
    """As a browser asks: first whether it may, then with the key."""
    served = Served(engine, keys=("secret",), origins=origins, hosts=frozenset(["localhost"]))
    header = "Access-Control-Allow-Origin"
    asked = served.client.options(CHAT, headers={**PREFLIGHT, "Origin": origin})
    assert asked.headers.get(header) == allowed
    assert (asked.status_code == 200) == (allowed is not None)
    if allowed:
        assert "x-stainless-lang" in asked.headers["Access-Control-Allow-Headers"]
    body = {"messages": ASKED, "max_tokens": 2}
    for headers, status in (
        ({"Authorization": "Bearer secret"}, 200),
        ({}, 401),
        ({"Authorization": "Bearer secret", "Host": "evil.example"}, 403),
    ):
        answer = served.post(CHAT, body, Origin=origin, **headers)
        assert answer.status_code == status
        # Errors as well, or a page could not read them.
        assert answer.headers.get(header) == allowed
        assert "Access-Control-Allow-Credentials" not in answer.headers
    stream = served.post(
        CHAT, {**body, "stream": True}, Origin=origin, Authorization="Bearer secret"
    )
    assert stream.headers.get(header) == allowed and stream.text.endswith("[DONE]\n\n")
    assert served.client.get(f"{PLACE}/health").headers.get(header) is None
    served.close()


def test_log_probabilities_as_json(served: Served) -> None:
    """In a stream as in one piece; what is least likely is no infinity."""
    whole = ask(served, ASKED[0], logprobs=True, top_logprobs=2).json()["choices"][0]
    told = whole["logprobs"]["content"]
    assert "".join(one["token"] for one in told) == whole["message"]["content"]
    assert all(one["bytes"] == list(one["token"].encode()) for one in told)
    assert all(one["top_logprobs"][0]["logprob"] == one["logprob"] for one in told)
    assert all(len(one["top_logprobs"]) == 2 for one in told)
    stream = ask(served, ASKED[0], logprobs=True, top_logprobs=2, stream=True)
    chunks = [json.loads(line[6:]) for line in stream.text.split("\n\n") if line[6:7] == "{"]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [one for c in choices for one in (c["logprobs"] or {"content": []})["content"]] == told


@pytest.mark.parametrize("prompt", ["A quiet harbour", [ord(c) for c in "A quiet harbour"]])
def test_prompts_before_their_answers(served: Served, prompt: Any) -> None:
    """Whole and in a stream, each answer of a prompt with the prompt's own log-probabilities."""

    def complete(**more: Any) -> Any:
        body = {"prompt": prompt, "max_tokens": 2, "n": 2, "echo": True, **more}
        return served.post("/v1/completions", body)

    assert complete().json()["choices"][1]["text"].startswith("A quiet harbour")
    first, second = complete(logprobs=1).json()["choices"]
    assert first["text"] == "".join(first["logprobs"]["tokens"])
    assert {**second, "index": 0} == first
    told = first["logprobs"]
    assert told["text_offset"] == list(range(len("A quiet harbour") + 2))
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    assert all(value <= 0 for value in told["token_logprobs"][1:])
    # The likeliest, and the token itself.
    assert all(1 <= len(top) <= 2 for top in told["top_logprobs"][1:])
    read = complete(logprobs=1, max_tokens=0).json()
    assert read["choices"][1]["text"] == "A quiet harbour"
    assert read["choices"][1]["logprobs"]["token_logprobs"] == told["token_logprobs"][:-2]
    assert read["usage"]["completion_tokens"] == 0
    for more in ({}, {"logprobs": 1}):
        texts, tokens = ["", ""], [[], []]  # type: ignore[var-annotated]
        for line in complete(stream=True, **more).text.split("\n\n"):
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                texts[choice["index"]] += choice["text"]
                tokens[choice["index"]] += (choice["logprobs"] or {"tokens": []})["tokens"]
        assert texts == [first["text"]] * 2
        assert tokens == ([told["tokens"]] * 2 if more else [[], []])


def test_where_the_tokens_of_a_prompt_begin() -> None:
    """What a tokenizer puts before a text is not in it; of ids that were given, all are."""
    texts = {0: "<s>", 1: "ab", 2: "c"}

    def decode(ids: Sequence[int]) -> str:
        return "".join(texts[token] for token in ids)

    given = Echoed("abc", [0, 1, 2], decode)
    assert (given.text, given.places()) == ("abc", [0, 0, 2])
    given = Echoed(None, [0, 1, 2], decode)
    assert (given.text, given.places()) == ("<s>abc", [0, 3, 5])
