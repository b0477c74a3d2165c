"""The server by a real client: what it answers, whom it turns away, and what does not disturb."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("torch")
pytest.importorskip("mlx.core")

import httpx2  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

from supra_cli.main import app  # noqa: E402
from supra_cli.shared.speech import load_speaker  # noqa: E402
from supra_core.runtime.sampling import Sampling  # noqa: E402
from supra_core.text import Rendering  # noqa: E402
from tests.mlx.chat import write_chat_model  # noqa: E402
from tests.mlx.models import SPECS  # noqa: E402

KEY = "a secret"
DOCUMENT = "The handbook says that every state has one size. " * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("models") / "tiny", SPECS["windowed"])


class Server:
    """``supra serve`` in a process of its own."""

    def __init__(self, *arguments: str, log: Path) -> None:
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "supra_cli", "serve", *arguments, "--port", "0"],
                stderr=file, env=os.environ | {"SUPRA_API_KEY": KEY},
            )  # fmt: skip
        self.url = self._address()

    def _address(self) -> str:
        for _ in range(600):
            if found := re.search(r" at (http://\S+)/v1", self.log.read_text()):
                return found[1]
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def client(self, key: str = KEY) -> Any:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def post(self, path: str, content: bytes, **headers: str) -> Any:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json", **headers}
        return httpx2.post(self.url + path, content=content, headers=headers, timeout=60)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)


@pytest.fixture(scope="module", params=["mlx", "torch"])
def server(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("serve")
    speaker = load_speaker(str(folder), request.param)
    conversation = speaker.conversation(None)
    conversation.read(DOCUMENT)
    speaker.save(conversation, place / "book.state")
    server = Server(
        str(folder), "--backend", request.param, "--context", f"book={place / 'book.state'}",
        "--max-prompt", "1000", "--max-tokens", "400", "--waiting", "30",
        log=place / "log",
    )  # fmt: skip
    server.backend = request.param
    yield server
    assert server.stop() == 130, server.log.read_text()


@pytest.fixture(scope="module")
def expected(server: Server, folder: Path) -> Callable[..., str]:
    """What the model says when nobody else asks."""
    speaker = load_speaker(str(folder), server.backend)

    def answer(*messages: dict[str, str], tokens: int = 12) -> str:
        engine = speaker.engine
        ids = engine.render(messages)
        sampling = Sampling(max_tokens=tokens)
        pieces = engine.generate(ids, engine.fresh(), sampling, lambda *_, **__: None)
        return "".join(piece for _, piece in pieces)

    return answer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def ask(client: Any, *messages: dict[str, str], tokens: int = 12, **more: Any) -> Any:
    return client.chat.completions.create(
        model=more.pop("model", "tiny"), messages=list(messages), max_tokens=tokens, **more
    )


def streamed(client: Any, *messages: dict[str, str], tokens: int = 12) -> tuple[str, str]:
    """Text and finish reason, from chunks."""
    text, finish = "", ""
    for chunk in ask(client, *messages, tokens=tokens, stream=True):
        text += chunk.choices[0].delta.content or ""
        finish = chunk.choices[0].finish_reason or finish
    return text, finish


def test_models(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:book"]
    assert client.models.retrieve("tiny:book").id == "tiny:book"
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_chat_whole_and_in_a_stream(server: Server, expected: Callable[..., str]) -> None:
    client = server.client()
    system = {"role": "developer", "content": "Be brief."}
    plain = {"role": "system", "content": "Be brief."}
    answer = ask(client, system, user("Hello"))
    assert answer.choices[0].message.content == expected(plain, user("Hello"))
    assert answer.usage.completion_tokens <= 12
    assert answer.choices[0].finish_reason in ("stop", "length")
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    same = ask(client, {"role": "user", "content": parts})
    assert same.choices[0].message.content == expected(user("Hel\nlo"))
    assert streamed(client, user("Why?"))[0] == expected(user("Why?"))


def test_usage_in_a_stream(server: Server) -> None:
    chunks = list(
        ask(server.client(), user("Count"), stream=True, stream_options={"include_usage": True})
    )
    whole = ask(server.client(), user("Count"))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_conversation_goes_on_from_its_state(
    server: Server, expected: Callable[..., str]
) -> None:
    client = server.client()
    messages = [user("A question of some length, so that it shows")]
    for turn in range(3):
        answer = ask(client, *messages)
        text = answer.choices[0].message.content
        assert text == expected(*messages)
        known = answer.usage.prompt_tokens_details.cached_tokens
        # What is new: the end of the answer, the question, and two lines of roles.
        assert not turn or answer.usage.prompt_tokens - known < 60
        messages += [{"role": "assistant", "content": text}, user("And then?")]


def test_a_context_is_read_already(server: Server, expected: Callable[..., str]) -> None:
    client = server.client()
    answer = ask(client, user("What does it say?"), model="tiny:book")
    system = {"role": "system", "content": DOCUMENT}
    assert answer.choices[0].message.content == expected(system, user("What does it say?"))
    assert answer.usage.prompt_tokens_details.cached_tokens >= len(DOCUMENT)
    with pytest.raises(openai.BadRequestError, match="omit yours"):
        ask(client, {"role": "system", "content": "x"}, user("y"), model="tiny:book")


def test_several_answers(server: Server) -> None:
    client = server.client()
    sampled = {"temperature": 1.0, "seed": 7, "n": 3}
    first, again = (ask(client, user("Say"), tokens=16, **sampled) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3
    assert [choice.index for choice in first.choices] == [0, 1, 2]


def test_completions_of_texts_and_ids(server: Server, folder: Path) -> None:
    client = server.client()
    made = client.completions.create(model="tiny", prompt=["abc", "hello"], max_tokens=8, n=2)
    texts = [choice.text for choice in made.choices]
    assert texts[0] == texts[1]
    assert made.usage.prompt_tokens == 8
    engine = load_speaker(str(folder), server.backend).engine
    ids = engine.encode("hello")
    given = client.completions.create(model="tiny", prompt=ids, max_tokens=8)
    assert given.choices[0].text == texts[2] == texts[3]
    with pytest.raises(openai.BadRequestError, match="no token"):
        client.completions.create(model="tiny", prompt=[10**6], max_tokens=8)


def test_an_answer_that_was_begun_goes_on(server: Server, folder: Path) -> None:
    client, engine = server.client(), load_speaker(str(folder), server.backend).engine
    messages = [user("Why?"), {"role": "assistant", "content": "Because it"}]
    ids = engine.render(messages, None, Rendering(continues=True))
    assert engine.decode(ids).endswith("Because it")
    sampling = Sampling(max_tokens=12)
    pieces = engine.generate(ids, engine.fresh(), sampling, lambda *_, **__: None, (), True)
    assert ask(client, *messages).choices[0].message.content == "".join(text for _, text in pieces)
    assert streamed(client, *messages)[0] == ask(client, *messages).choices[0].message.content


def test_how_likely_an_answer_was(server: Server, folder: Path) -> None:
    """As it is said, and by a pass over prompt and answer; whole and in a stream."""
    client, engine = server.client(), load_speaker(str(folder), server.backend).engine
    # Longer than what is looked at together.
    prompt = engine.encode("A harbour in winter. " * 9)
    asked = {"model": "tiny", "max_tokens": 6, "temperature": 1.0, "seed": 3, "logprobs": 3}
    said = client.completions.create(prompt=prompt, **asked).choices[0]
    assert "".join(said.logprobs.tokens[: len(said.text)]) == said.text
    whole = [*prompt, *(engine.encode(token)[0] for token in said.logprobs.tokens)]
    read = client.completions.create(
        model="tiny", prompt=whole, max_tokens=0, logprobs=3, echo=True
    ).choices[0]
    assert read.logprobs.tokens == [*engine.decode(prompt), *said.logprobs.tokens]
    count = len(said.logprobs.tokens)
    assert read.logprobs.token_logprobs[-count:] == pytest.approx(
        said.logprobs.token_logprobs, abs=1e-3
    )
    for one, other in zip(
        read.logprobs.top_logprobs[-count:], said.logprobs.top_logprobs, strict=True
    ):
        assert one == pytest.approx(other, abs=1e-3)
    # The lm-eval harness: all but the first and the last, of which it asks for one.
    scored = client.completions.create(
        model="tiny", prompt=[whole, prompt], max_tokens=1, temperature=0, logprobs=1, echo=True,
        seed=1234,
    )  # fmt: skip
    for choice, ids in zip(scored.choices, (whole, prompt), strict=True):
        assert len(choice.logprobs.token_logprobs) == len(ids) + 1
        assert choice.logprobs.token_logprobs[1:-1] == pytest.approx(
            read.logprobs.token_logprobs[1 : len(ids)], abs=1e-3
        )
    told = ask(client, user("Why?"), logprobs=True, top_logprobs=2)
    content = told.choices[0].logprobs.content
    assert "".join(one.token for one in content[: told.usage.completion_tokens]).startswith(
        told.choices[0].message.content
    )
    chunks = ask(client, user("Why?"), logprobs=True, top_logprobs=2, stream=True)
    logprobs = [chunk.choices[0].logprobs for chunk in chunks]
    assert [one for found in logprobs if found for one in found.content] == content


def test_an_answer_of_nothing_but_its_end(server: Server, folder: Path) -> None:
    """The token that ends an answer is told of, too: a harness counts on one more."""
    engine = load_speaker(str(folder), server.backend).engine
    ids = engine.encode("x")
    end = engine.encode("<|im_end|>")
    asked = {"max_tokens": 1, "logprobs": 1, "echo": True, "stop_token_ids": list(range(10**3))}
    (choice,) = (
        server.client().completions.create(model="tiny", prompt=ids, extra_body=asked).choices
    )
    assert len(end) == 1 and choice.text == "x" and choice.finish_reason == "stop"
    assert len(choice.logprobs.token_logprobs) == 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"extra_body": {"top_k": 5}}, "top_k"), ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs"), ({"extra_body": {"grammer": "x"}}, "grammer"),
        ({"temperature": -1}, "temperature"), ({"n": 9}, "n"),
    ],
)  # fmt: skip
def test_errors_as_the_client_tells_them(server: Server, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as told:
        ask(server.client(), user("x"), **fields)
    assert told.value.param == param and param in str(told.value)
    assert told.value.type == "invalid_request_error"


def test_stop_strings(server: Server, expected: Callable[..., str]) -> None:
    whole = expected(user("Go on"), tokens=40)
    stop = whole[10:12]
    answer = ask(server.client(), user("Go on"), tokens=40, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_sixteen_at_a_time_and_one_leaves(server: Server, expected: Callable[..., str]) -> None:
    questions = [f"Question {i} {'of some length ' * (i % 5)}" for i in range(16)]
    barrier = threading.Barrier(17)

    def one(question: str) -> tuple[str, str]:
        barrier.wait()
        return streamed(server.client(), user(question), tokens=30)

    def leaver() -> None:
        """Takes a few chunks, then its connection is cut."""
        barrier.wait()
        body = json.dumps({"messages": [user("x")], "stream": True, "max_tokens": 400}).encode()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        url = f"{server.url}/v1/chat/completions"
        with httpx2.stream("POST", url, content=body, headers=headers, timeout=60) as response:
            for _, line in zip(range(6), response.iter_lines(), strict=False):
                assert isinstance(line, str)

    def nuisance() -> None:
        """Malformed, oversized, unknown and unauthorised, while the others are served."""
        for _ in range(4):
            assert server.post("/v1/chat/completions", b"{").status_code == 400
            assert server.post("/v1/chat/completions", b" " * 10**6).status_code == 413
            wrong = server.post("/v1/chat/completions", b"{}", Authorization="Bearer x")
            assert wrong.status_code == 401

    with ThreadPoolExecutor(18) as pool:
        answers = [pool.submit(one, question) for question in questions]
        others = [pool.submit(leaver), pool.submit(nuisance)]
        for question, answer in zip(questions, answers, strict=True):
            assert answer.result(60)[0] == expected(user(question), tokens=30)
        for other in others:
            other.result(60)
    for _ in range(100):
        if httpx2.get(f"{server.url}/health").json()["requests"] == 0:
            return
        time.sleep(0.05)
    raise AssertionError("the one who left is still served")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"{", 400, "JSON"),
        (b"[]", 400, "object"),
        (b"{}", 400, "messages"),
        (b'{"messages": []}', 400, "messages"),
        (b'{"messages": [{"role": "user"}]}', 400, "content"),
        (b'{"messages": [{"role": "king", "content": "x"}]}', 400, "role"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": "9"}', 400, "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', 400, "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}', 400, "temperatur"),
        (b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}', 400, "tools"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 99}', 400, "n: "),
        (b'{"messages": [{"role": "user", "content": "x"}], "model": "y"}', 404, "tiny"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, ""),
        (json.dumps({"messages": [user("long " * 300)]}).encode(), 400, "1,000"),
        (b'{"messages": "' + b"x" * 70_000 + b'"}', 413, "shorten"),
        (b'{"messages": [{"role": "user", "content": null}]}', 400, "content: must be text, or"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 400, "type text"),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_k": 5}', 400, "top_k"),
        (b'{"messages": [{"role": "user", "content": "x"}], "logprobs": 1}', 400, "logprobs"),
    ],
)  # fmt: skip
def test_malformed_requests(server: Server, body: bytes, status: int, says: str) -> None:
    answer = server.post("/v1/chat/completions", body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("prompt", 5, "prompt"), ("prompt", [], "prompt"), ("prompt", ["a", 5], "prompt"),
        ("prompt", [[]], "prompt"), ("prompt", [3, 10**9], "prompt"), ("best_of", 2, "best_of"),
        ("logprobs", 6, "logprobs"), ("top_p", 0, "top_p"), ("temperature", 1e9, "temperature"),
        ("prompt", ["x"] * 47, None),
    ],
)  # fmt: skip
def test_malformed_completions(server: Server, field: str, value: Any, param: str | None) -> None:
    answer = server.post(
        "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 1, field: value}).encode()
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_what_is_null_or_changes_nothing_is_let_pass(server: Server) -> None:
    nothing = dict.fromkeys(
        ("n", "stream", "temperature", "top_p", "stop", "seed", "tools", "logprobs", "model",
         "stream_options", "response_format", "max_tokens", "frequency_penalty")
    )  # fmt: skip
    neutral = {"frequency_penalty": 0.0, "best_of": 1, "top_k": -1, "echo": False, "user": "me"}
    for fields in (nothing, neutral):
        body = {"prompt": "x", **fields, "max_completion_tokens": 2}
        answer = server.post(
            "/v1/completions", json.dumps(body).encode(), **{"Content-Type": "Application/JSON"}
        )
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] <= 2


def test_others_are_turned_away(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError, match="key"):
        server.client("wrong").models.list()
    assert (
        server.post("/v1/chat/completions", b"{}", **{"Content-Type": "text/plain"}).status_code
        == 415
    )  # noqa: E501
    assert server.post("/v1/chat/completions", b"{}", Host="evil.example").status_code == 403
    assert server.post("/v1/chat/completions", b"{}", Host="[").status_code == 403
    assert server.post("/v1/nothing", b"{}").json()["error"]["message"].startswith("POST /v1/no")
    wrong = httpx2.get(f"{server.url}/v1/chat/completions")
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "POST")


def test_more_than_may_wait(server: Server) -> None:
    # 16 are spoken, 30 wait; each of these is three.
    with ThreadPoolExecutor(24) as pool:
        body = json.dumps({"messages": [user("x")], "n": 3, "max_tokens": 100}).encode()
        asked = [pool.submit(server.post, "/v1/chat/completions", body) for _ in range(24)]
        codes = [one.result(100).status_code for one in asked]
    assert set(codes) <= {200, 429}
    assert codes.count(200) >= 10
    busy = [one.result() for one in asked if one.result().status_code == 429]
    assert all(one.headers["retry-after"] == "1" for one in busy)


def test_ctrl_c_ends_what_is_being_said(folder: Path, tmp_path: Path) -> None:
    server = Server(str(folder), "--backend", "torch", log=tmp_path / "log")
    body = {"messages": [user("x" * 20)], "max_tokens": 4000, "stream": True}
    lines: list[str] = []
    with httpx2.stream(
        "POST", f"{server.url}/v1/chat/completions", json=body, timeout=60,
        headers={"Authorization": f"Bearer {KEY}"},
    ) as answer:  # fmt: skip
        for line in answer.iter_lines():
            lines.append(line)
            if len(lines) == 8:
                server.process.send_signal(signal.SIGINT)
    assert server.process.wait(20) == 130
    told = server.log.read_text()
    assert "Traceback" not in told
    assert "ERROR" not in told
    # Unless the model had ended by itself, the stream says why it ends.
    events = [line for line in lines if line.startswith("data: ")]
    if events[-1] != "data: [DONE]":
        assert json.loads(events[-1][6:])["error"]["message"].startswith("the server is stopping")


def test_bad_settings(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, says in (
            (("--port", port), f"127.0.0.1:{port}"),
            (("--context", "book"), "NAME=FILE"),
            (("--context", f"book={tmp_path / 'none'}"), "does not exist"),
            (("--parallel", "0"), "--parallel"),
            (("--top-p", "2"), "top_p"),
        ):
            done = CliRunner().invoke(app, ["serve", str(folder), "--port", "0", *arguments])
            assert done.exit_code == 2, done.output
            assert says in done.stderr
