"""Every field that clients send: done, let pass because no answer depends on it, or refused."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from supra_cli.serving import fields  # noqa: E402
from supra_cli.serving.fields import DONE, IGNORED, REFUSED, REFUSED_HERE, Route  # noqa: E402
from supra_core.runtime.engine import Message  # noqa: E402
from supra_core.runtime.sampling import Sampling  # noqa: E402
from supra_core.text.chat_template import ANSWER, Rendering  # noqa: E402
from tests.cli.served import Served  # noqa: E402
from tests.core.echo import Echo  # noqa: E402

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"
PATHS: dict[Route, str] = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
ASKED: dict[Route, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "Why?"}]},
    "completions": {"prompt": "Once"},
}
MOST = 8
# No neutral value of anything.
OTHER = {"something": [1]}

# By which states of prompts are found: no answer depends on them.
SALTS = ("user", "prompt_cache_key", "cache_salt")

# Of what is done: a value that changes nothing, one that does, and what else that one needs.
_BOTH: dict[str, tuple[Any, ...]] = {
    "model": ("tiny", "other"),
    "max_tokens": (-1, 3), "max_completion_tokens": (-1, 3), "n_predict": (-1, 3),
    "temperature": (0.0, 0.7), "top_p": (1.0, 0.5), "min_p": (0.0, 0.1),
    "repetition_penalty": (1.0, 1.3), "repeat_penalty": (1.0, 1.3), "seed": (-1, 7),
    "stop": ([], [chr(c) for c in range(97, 113)]), "stop_token_ids": ([], list(range(97, 123))),
    "n": (1, 2), "stream": (False, True),
    "stream_options": ({"include_usage": False}, {"include_usage": True}, {"stream": True}),
    **dict.fromkeys(SALTS, ("", "me")),
}  # fmt: skip
CHANGES: dict[Route, dict[str, tuple[Any, ...]]] = {
    "chat": {
        **_BOTH,
        "messages": (ASKED["chat"]["messages"], [{"role": "user", "content": "How?"}]),
        "logprobs": (False, True),
        "top_logprobs": (0, 2, {"logprobs": True}),
        "chat_template_kwargs": ({}, {"enable_thinking": False}),
        "add_generation_prompt": (True, False),
        "continue_final_message": (False, True),
    },
    "completions": {
        **_BOTH, "prompt": ("Once", "Twice"), "logprobs": (False, 0), "echo": (False, True)
    },
}  # fmt: skip


class Told(Echo):
    """Keeps what it was told besides tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def render(
        self, messages: Sequence[Message], now: datetime | None = None, how: Rendering = ANSWER
    ) -> list[int]:
        self.told.append(how)
        return super().render(messages, now, how)

    def generate(
        self, ids: Sequence[int], state: list[int], sampling: Sampling, *more: Any
    ) -> Generator[tuple[int, str]]:
        self.told.append(sampling)
        return super().generate(ids, state, sampling, *more)


class Client(Served):
    """What a request came to: all that its answer depends on, and the answer."""

    def __init__(self) -> None:
        self.told = Told()
        super().__init__(self.told, most=MOST)

    def ask(self, route: Route, **body: Any) -> Any:
        return self.post(PATHS[route], {**ASKED[route], **body})

    def outcome(self, route: Route, **body: Any) -> Any:
        self.told.told.clear()
        answer = self.ask(route, **body)
        assert answer.status_code == 200, answer.text
        if body.get("stream"):
            events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
            return list(self.told.told), [e if e == "[DONE]" else self._said(e) for e in events]
        return list(self.told.told), self._said(answer.text)

    @staticmethod
    def _said(text: str) -> Any:
        body = json.loads(text)
        return body["choices"], bool(body.get("usage"))


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    running = Client()
    yield running
    running.close()


def test_all_that_is_done_is_tried() -> None:
    assert {route: set(table) for route, table in CHANGES.items()} == DONE


def test_no_field_is_in_two_rows() -> None:
    for route in PATHS:
        rows = [*DONE[route], *IGNORED, *REFUSED, *REFUSED_HERE[route]]
        assert len(rows) == len(set(rows))


@pytest.mark.parametrize(
    ("route", "name"), [(route, name) for route in PATHS for name in sorted(CHANGES[route])]
)
def test_what_is_done(client: Client, route: Route, name: str) -> None:
    neutral, changing, *more = CHANGES[route][name]
    needed = more[0] if more else {}
    usual = client.outcome(route, **needed)
    for nothing in (neutral, None):
        if name not in ASKED[route] or nothing is not None:
            assert client.outcome(route, **{name: nothing, **needed}) == usual
    answer = client.ask(route, **{name: changing, **needed})
    if answer.status_code == 200:
        same = client.outcome(route, **{name: changing, **needed}) == usual
        assert same == (name in SALTS)
    else:
        assert answer.json()["error"]["param"] == name


@pytest.mark.parametrize("route", PATHS)
def test_what_no_answer_depends_on_is_let_pass(client: Client, route: Route) -> None:
    usual = client.outcome(route)
    for name in sorted(IGNORED):
        for value in (OTHER, 1, "a", None):
            assert client.outcome(route, **{name: value}) == usual, name


@pytest.mark.parametrize(
    ("route", "name"),
    [(route, name) for route in PATHS for name in sorted({**REFUSED, **REFUSED_HERE[route]})],
)
def test_what_is_not_done_is_refused_by_name(client: Client, route: Route, name: str) -> None:
    usual = client.outcome(route)
    for value in (*{**REFUSED, **REFUSED_HERE[route]}[name], None):
        assert client.outcome(route, **{name: value}) == usual
    for value in (OTHER, 17, "something"):
        answer = client.ask(route, **{name: value})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, name)
        assert error["message"].startswith(f"{name} is not supported")


@pytest.mark.parametrize("route", PATHS)
@pytest.mark.parametrize("name", ["grammer", "maxTokens", "Temperature", ""])
def test_what_is_not_known_is_refused_by_name(client: Client, route: Route, name: str) -> None:
    answer = client.ask(route, **{name: 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == f"{name} is unknown: omit it"
    assert client.ask(route, **{name: None}).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stream_options": {"include_usage": True, "chunks": 3}}, "stream_options.chunks"),
        ({"messages": [{"role": "user", "content": "x", "weight": 0}]}, "messages.0.weight"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "cut": 1}]}]},
         "messages.0.content.0.cut"),
        ({"repeat_penalty": 1.2, "repetition_penalty": 1.3}, "repetition_penalty"),
        ({"n_predict": 3, "max_tokens": 4}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"), ({"logprobs": 3}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": -2}, "max_tokens"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids.0"),
    ],
)  # fmt: skip
def test_what_is_wrong_inside_is_named(client: Client, body: Any, param: str) -> None:
    answer = client.ask("chat", **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert param.rpartition(".")[2] in error["message"]


def test_more_tokens_than_the_server_gives_are_capped(client: Client) -> None:
    for route in PATHS:
        for asked in (32000, MOST, -1, None):
            (*_, sampling), ((choice,), _) = client.outcome(route, max_tokens=asked)
            assert sampling.max_tokens == MOST and choice["finish_reason"] == "length"


def test_a_seed_of_minus_one_is_none(client: Client) -> None:
    for seed, used in ((-1, None), (None, None), (5, 5), (-7, 2**32 - 7), (2**40 + 3, 3)):
        (*_, sampling), _ = client.outcome("completions", seed=seed, temperature=1.0)
        assert sampling.seed == used


def test_all_that_openais_own_client_can_send_is_known() -> None:
    pytest.importorskip("openai")
    from openai.types import completion_create_params as text
    from openai.types.chat import completion_create_params as chat

    for route, kind in (("chat", chat), ("completions", text)):
        sent = kind.CompletionCreateParamsBase.__annotations__.keys()
        assert sent <= DONE[route] | IGNORED | REFUSED.keys() | REFUSED_HERE[route].keys()


def rows() -> Iterator[str]:
    """The table of docs/cli.md, line by line."""
    both = DONE["chat"] & DONE["completions"]
    yield f"| done | {_named(both)} |"
    yield f"| done in chat completions | {_named(DONE['chat'] - both)} |"
    yield f"| done in completions | {_named(DONE['completions'] - both)} |"
    yield f"| let pass | {_named(IGNORED)} |"
    refused = [
        f"`{name}`" + "".join(f" `{json.dumps(value)}`" for value in values)
        for name, values in sorted(REFUSED.items())
    ]
    yield f"| refused, unless it has the value shown | {', '.join(refused)} |"


def _named(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def test_the_documented_table_is_this_one() -> None:
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    assert [row for row in rows() if row not in lines] == []
    assert fields.ALIASES == {"repeat_penalty": "repetition_penalty", "n_predict": "max_tokens"}
