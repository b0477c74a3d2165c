"""What clients do that mean harm, or are merely slow: others are served, and nothing stays."""

from __future__ import annotations

import json
import math
import re
import socket
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from supra_cli.serving import server  # noqa: E402
from supra_cli.serving.connections import Doors  # noqa: E402
from supra_cli.serving.quiet import Seldom  # noqa: E402
from supra_cli.serving.service import _CUT, _SLICE, Limits, Service  # noqa: E402
from supra_core.progress import Progress, silent  # noqa: E402
from supra_core.runtime.likelihood import Logits  # noqa: E402
from supra_core.runtime.prefixes import Prefixes  # noqa: E402
from supra_core.runtime.sampling import Sampling  # noqa: E402
from supra_core.runtime.scheduler import Scheduler  # noqa: E402
from tests.cli.served import Served  # noqa: E402
from tests.core.echo import Echo  # noqa: E402

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LOCAL = frozenset(["localhost", "127.0.0.1"])


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


# --- who asks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (b"Bearer one", 200), (b"bearer one", 200), (b"BEARER  two ", 200),
        ("Bearer schlüssel".encode(), 200),
        (b"Bearer \xff\xfe", 401), (b"Basic one", 401), (b"one", 401), (b"Bearer", 401),
        (b"", 401), (b"Bearer one two", 401),
    ],
)  # fmt: skip
def test_keys(header: bytes, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    served = Served(Echo(), keys=("one", "two", "schlüssel"))
    answer = served.client.get("/v1/models", headers=[(b"authorization", header)])  # type: ignore[arg-type]
    assert answer.status_code == status
    assert status == 200 or "API key" in answer.json()["error"]["message"]
    assert "Traceback" not in capsys.readouterr().err
    served.close()


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/nothing", "/v1/completions"])
def test_a_page_elsewhere_whose_name_points_here(path: str) -> None:
    served = Served(Echo(), hosts=LOCAL)
    assert served.client.get(path, headers={"Host": "evil.example"}).status_code == 403
    assert served.client.get(path, headers={"Host": "localhost:1"}).status_code != 403
    served.close()


# --- what others asked --------------------------------------------------------------------------

SECRET = "the harbour opens at six, and the password is herring"
ASKED = {"max_tokens": 2, "stream_options": {"include_usage": True}, "stream": True}


def told(served: Served, prompt: str, key: str = "mine", **more: Any) -> tuple[list[str], int]:
    """Of a prompt: the comments in its stream, and the number of tokens that were known."""
    answer = served.post(TEXT, {"prompt": prompt, **ASKED, **more}, **bearer(key))
    lines = answer.text.splitlines()
    *_, last = (line for line in lines if line.startswith("data: {"))
    usage = json.loads(last.removeprefix("data: "))["usage"]
    comments = [line for line in lines if line.startswith(":")]
    return comments, usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"key": "yours"}, {}), ({"user": "you"}, {"user": "me"}), ({"user": "you"}, {}),
        ({"prompt_cache_key": "you"}, {"prompt_cache_key": "me"}),
        ({"cache_salt": "you"}, {"cache_salt": "me"}), ({"user": "me"}, {"cache_salt": "me"}),
    ],
)  # fmt: skip
def test_nobody_is_told_what_others_asked(before: dict[str, Any], after: dict[str, Any]) -> None:
    served, alone = (Served(Echo(), keys=("mine", "yours")) for _ in range(2))
    guess = SECRET[:20] + "?"
    told(served, SECRET, **before)
    assert told(served, guess, **after) == told(alone, guess, **after)
    # Nor by what the second of two like prompts leaves, and everybody knows what is their own.
    assert told(served, guess + "?", **after) == told(alone, guess + "?", **after)
    assert told(served, SECRET + "!", **before)[1] >= len(SECRET) - 1
    served.close()
    alone.close()


def test_states_are_shared_where_the_operator_says_so() -> None:
    served = Served(Echo(), keys=("mine", "yours"), shared=True)
    told(served, SECRET, key="yours", user="you")
    assert told(served, SECRET)[1] == len(SECRET) - 1
    served.close()


# --- what costs much and is refused -------------------------------------------------------------


class Counting(Echo):
    """Counts the characters that it tokenises; ``gate``: long texts wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded = 0
        self.begun, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def encode(self, text: str) -> list[int]:
        self.encoded += len(text)
        if len(text) > 30_000:
            self.begun.set()
            assert self.gate.wait(60)
        return super().encode(text)


@contextmanager
def counted(places: int = 4, **settings: Any) -> Iterator[tuple[Served, Counting]]:
    engine = Counting()
    served = Served(engine, prompt_tokens=60_000, waiting=places - 2, **settings)
    try:
        yield served, engine
    finally:
        engine.gate.set()
        served.close()


def test_a_prompt_of_too_many_tokens_is_read_up_to_the_limit() -> None:
    with counted() as (served, engine):
        for prompt, read in (
            ("x" * 900_000, 2 * _SLICE), (["y" * 300_000] * 3, 2 * _SLICE), ([7] * 60_001, 0),
            ("z" * 60_001, 2 * 60_001),
        ):  # fmt: skip
            engine.encoded = 0
            answer = served.post(TEXT, {"prompt": prompt, "max_tokens": 1})
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "context_length_exceeded"
            assert engine.encoded <= read + _SLICE
            assert served.client.get("/health").json()["requests"] == 0
        fits = "x" * (60_000 - _CUT)
        assert served.post(TEXT, {"prompt": fits, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("route", "asked"),
    [
        (TEXT, {"prompt": "x" * 50_000}),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 50_000}]}),
    ],
)
def test_a_place_is_taken_before_a_prompt_is_read(route: str, asked: dict[str, Any]) -> None:
    """And while long ones are read, short ones of others, and of the same client, are answered."""
    with counted(keys=("mine", "yours"), compete=True) as (served, engine), Pool() as pool:
        engine.gate.clear()
        long = {**asked, "max_tokens": 1, "n": 2}
        waiting = pool.submit(served.post, route, long, **bearer("yours"))
        assert engine.begun.wait(20)
        wait_for(lambda: served.client.get("/health").json()["requests"] == 2)
        # Half of four places are one client's.
        short = {"prompt": "Once", "max_tokens": 1}
        refused = served.post(TEXT, short, **bearer("yours"))
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert "one client" in refused.json()["error"]["message"]
        assert served.post(TEXT, short, **bearer("mine")).status_code == 200
        engine.gate.set()
        assert waiting.result(60).status_code == 200
        assert served.client.get("/health").json()["requests"] == 0


class Pool(ThreadPoolExecutor):
    def __init__(self) -> None:
        super().__init__(8)


def wait_for(true: Any) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come about")


def test_bodies_that_are_sent_at_a_time_have_a_limit() -> None:
    limits = Limits(10, 10)
    service = Service(None, None, "tiny", 256, limits, Sampling())  # type: ignore[arg-type]
    with service.receiving("one") as take, service.receiving("two") as other:
        take(limits.own_bytes)
        other(limits.own_bytes)
        with pytest.raises(Exception, match="you send too much"):
            take(1)
        for number in range(2):
            with service.receiving(f"more {number}") as third:
                third(limits.own_bytes - 2)
        with pytest.raises(Exception, match="all clients together"), service.receiving("z") as last:
            last(2 * limits.own_bytes)
    with service.receiving("one") as take:
        take(limits.own_bytes)


# --- connections --------------------------------------------------------------------------------

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


class Listening:
    """The server on a port, in threads of this process; ``doors``: its limits of connections."""

    def __init__(self, engine: Echo, doors: Doors, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(server, "doors", lambda *_, **__: doors)
        self.doors, prefixes = doors, Prefixes(10**6, lambda tokens: 1)
        self.scheduler = Scheduler(lambda: (engine, prefixes), parallel=2, waiting=4)
        self.scheduler.start()
        service = Service(
            self.scheduler, engine, "tiny", 256, Limits(10**5, 10**7), Sampling(), hosts=LOCAL
        )
        listening = server._bound("127.0.0.1", 0)
        self.address = listening.getsockname()[:2]
        self._thread = threading.Thread(target=server._serve, args=(service, listening))
        self._thread.start()

    def connect(self, sent: bytes = b"") -> socket.socket:
        client = socket.create_connection(self.address, 30)
        client.sendall(sent)
        return client

    def health(self) -> int:
        client = HTTPConnection(*self.address, timeout=30)
        client.request("GET", "/health", headers={"Host": "localhost"})
        return client.getresponse().status

    def close(self) -> None:
        self.scheduler.close()
        self._thread.join()


@contextmanager
def listening(
    monkeypatch: pytest.MonkeyPatch, engine: Echo | None = None, **limits: Any
) -> Iterator[Listening]:
    running = Listening(engine or Echo(), Doors(**{"most": 20, "own": 20, **limits}), monkeypatch)
    try:
        yield running
    finally:
        running.close()


@pytest.mark.parametrize("limits", [{"most": 8}, {"own": 8}])
@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/comp", HEAD + b"X-", HEAD + b"Content-Length: 99\r\n\r\n{"]
)
def test_half_open_connections_lock_nobody_out(
    monkeypatch: pytest.MonkeyPatch, limits: dict[str, int], sent: bytes
) -> None:
    with listening(monkeypatch, **limits) as running:
        clients = [running.connect(sent) for _ in range(40)]
        assert running.health() == 200
        assert len(running.doors.open) <= 8
        for client in clients:
            client.close()


@pytest.mark.parametrize(
    ("sent", "limits"),
    [
        (b"", {"headers": 0.2}), (HEAD, {"headers": 0.2}), (HEAD + b"X-", {"headers": 0.2}),
        (HEAD + b"Content-Length: 99\r\n\r\n{", {"body": 0.2}),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\n{", {"body": 0.2}),
        # Turned away, and yet it goes on to send.
        (HEAD.replace(b"json", b"yaml") + b"Content-Length: 99\r\n\r\n{", {"body": 0.2}),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET", {"headers": 0.2}),
    ],
)  # fmt: skip
def test_who_does_not_end_a_request_is_cut_off(
    monkeypatch: pytest.MonkeyPatch, sent: bytes, limits: dict[str, float]
) -> None:
    """Also who sends a byte now and then."""
    with listening(monkeypatch, **limits) as running, running.connect(sent) as client:
        client.settimeout(0.05)
        began = time.monotonic()
        while time.monotonic() - began < 20:
            try:
                if not client.recv(1000):
                    break
                continue
            except TimeoutError:
                pass
            except ConnectionError:
                break
            try:
                client.sendall(b" " if sent else b"G")
            except ConnectionError:
                break
        assert 0.15 < time.monotonic() - began < 15
        assert running.scheduler.taken == 0


def test_who_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps({"prompt": "Once", "max_tokens": 10**7, "stream": True}).encode()
    with listening(monkeypatch, written=0.3) as running:
        sent = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
        with running.connect(sent):
            wait_for(lambda: running.scheduler.taken == 1)
            wait_for(lambda: running.scheduler.taken == 0)
        wait_for(lambda: not running.doors.open)


def test_more_connections_than_there_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of which are answered just now, so that nobody gives way."""
    engine = Held()
    body = json.dumps({"prompt": "Once", "max_tokens": 2}).encode()
    sent = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with listening(monkeypatch, engine, most=2) as running:
        clients = [running.connect(sent) for _ in range(2)]
        wait_for(lambda: running.scheduler.taken == 2)
        assert running.health() == 503
        engine.gate.set()
        for client in clients:
            assert client.recv(12) == b"HTTP/1.1 200"
            client.close()
        wait_for(lambda: running.health() == 200)


class Held(Echo):
    """Speaks when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def generate(self, *arguments: Any, **more: Any) -> Generator[tuple[int, str]]:
        for said in super().generate(*arguments, **more):
            assert self.gate.wait(60)
            yield said


def test_a_request_whose_end_is_said_in_two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    smuggled = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with listening(monkeypatch) as running, running.connect(HEAD + lengths + smuggled) as client:
        told = b""
        while part := client.recv(10_000):
            told += part
        assert told.startswith(b"HTTP/1.1 400") and b"contradict" in told
        assert told.count(b"HTTP/1.1") == 1


def test_the_log_cannot_be_filled(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with listening(monkeypatch, headers=0.1) as running:
        for sent in (b"", b"\x00\r\n\r\n", HEAD + b"Content-Length: 9\r\n\r\n", HEAD + b"\r\n"):
            for _ in range(40):
                with running.connect(sent):
                    pass
        assert running.health() == 200
        wait_for(lambda: not [one for one in running.doors.open if one.is_waiting])
    shown = capfd.readouterr().err
    assert shown.count("\n") < 50, shown
    assert "Traceback" not in shown


def test_lines_of_one_kind_are_seldom(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    seldom = Seldom(lambda: now)
    for number in range(1000):
        seldom.log("a", f"a {number}")
        seldom.failure(ValueError("b"))
        seldom.log(f"kind {number}", "c")
    shown = capsys.readouterr().err
    assert shown.count("a ") == 10 and shown.count("ValueError: b") == 10
    assert shown.count("c\n") < 200
    now = 61.0
    seldom.log("a", "again")
    shown = capsys.readouterr().err
    assert shown.endswith("again\n") and re.match(r"2,\d\d\d more lines", shown)


# --- numbers that are none ----------------------------------------------------------------------


class Broken(Echo):
    """Its logits are no numbers where a text holds ``!``."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self._value = value

    def _logits(self, state: Sequence[int]) -> Logits:  # type: ignore[override]
        logits = super()._logits(list(state))
        if ord("!") in state:
            logits[7] = self._value
        return logits

    def generate(
        self, ids: Sequence[int], state: list[int], sampling: Sampling, *more: Any
    ) -> Generator[tuple[int, str]]:
        from supra_core.runtime.sampling import sample

        for said in super().generate(ids, state, sampling, *more):
            sample(self._logits(state), sampling, np.random.default_rng(0))
            yield said


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "more", [{}, {"temperature": 1.0}, {"logprobs": 1}, {"echo": True, "logprobs": 1}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_yields_no_numbers(value: float, more: dict[str, Any], stream: bool) -> None:
    served = Served(Broken(value))
    asked = {"max_tokens": 4, "stream": stream, **more}
    answer = served.post(TEXT, {"prompt": "Once!x", **asked})
    assert answer.status_code == (200 if stream else 400)
    assert "not finite (NaN or infinity)" in answer.text and '"finish_reason"' not in answer.text
    good = served.post(TEXT, {"prompt": "Once", **asked})
    assert good.status_code == 200 and "NaN" not in good.text
    assert served.client.get("/health").json() == {"status": "ok", "requests": 0}
    served.close()


# --- the model's thread -------------------------------------------------------------------------


class Panic(BaseException):
    """As native code's, which is no Exception."""


class Panicking(Echo):
    """Reads no ``!``, though it is all right else."""

    def feed(self, ids: Sequence[int], state: list[int], progress: Progress = silent) -> None:
        if ord("!") in ids:
            raise Panic("index out of bounds")
        super().feed(ids, state, progress)


@pytest.mark.parametrize("stream", [False, True])
def test_the_server_says_that_its_model_has_ended(stream: bool) -> None:
    served = Served(Panicking())
    answer = served.post(TEXT, {"prompt": "Once!x", "stream": stream})
    says = "the model's thread has ended by an error (Panic: index out of bounds)"
    assert answer.status_code == (200 if stream else 503) and says in answer.text
    health = served.client.get("/health")
    assert health.status_code == 503 and says in health.json()["error"]["message"]
    assert served.post(TEXT, {"prompt": "Once"}).status_code == 503
    served.close()


def test_a_panic_elsewhere_is_one_requests_error(capsys: pytest.CaptureFixture[str]) -> None:
    class Encoding(Echo):
        def encode(self, text: str) -> list[int]:
            raise Panic("broken")

    served = Served(Encoding())
    assert served.post(TEXT, {"prompt": "Once"}).status_code == 500
    assert served.client.get("/health").json() == {"status": "ok", "requests": 0}
    served.close()


def test_keys_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from supra_cli.main import app

    told: list[Any] = []
    monkeypatch.setattr(server, "serve", told.append)
    keys = tmp_path / "keys"
    keys.write_text("one\n\n two \none\n")
    for more, expected in (((), ["one", "two"]), (("--api-key", "a b"), ["a b", "one", "two"])):
        done = CliRunner().invoke(app, ["serve", "model", "--api-keys", str(keys), *more])
        assert done.exit_code == 0, done.output
        assert told.pop().keys == expected
    for content in ("", " \n\n"):
        keys.write_text(content)
        done = CliRunner().invoke(app, ["serve", "model", "--api-keys", str(keys)])
        assert done.exit_code == 2 and str(keys) in done.output.replace("\n", "")
    done = CliRunner().invoke(app, ["serve", "model", "--api-keys", str(tmp_path / "none")])
    assert done.exit_code == 2 and "cannot be read" in done.output.replace("\n", " ")
