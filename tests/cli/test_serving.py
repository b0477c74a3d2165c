"""The server's routes around an engine of a few lines: on which day, and from where, it speaks."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
testclient = pytest.importorskip("starlette.testclient")

from typer.testing import CliRunner  # noqa: E402

from supra_cli.main import app  # noqa: E402
from supra_cli.serving import server  # noqa: E402
from supra_cli.serving.app import build  # noqa: E402
from supra_cli.serving.service import Context, Limits, Service  # noqa: E402
from supra_cli.shared.speech import Speaker  # noqa: E402
from supra_core.runtime import conversation as conversations  # noqa: E402
from supra_core.runtime.conversation import Conversation  # noqa: E402
from supra_core.runtime.sampling import Sampling  # noqa: E402
from supra_core.runtime.scheduler import Scheduler  # noqa: E402
from supra_core.runtime.state_file import Owner, SavedState, write_state  # noqa: E402
from tests.core.echo import Echo  # noqa: E402
from tests.tiny_chat import write_model  # noqa: E402

OWNER = Owner("abc", "model", "echo", "float32")
DOCUMENT = "The handbook says that every state has one size. "
QUESTION = {"role": "user", "content": "What does it say?"}


class Sizes:
    def memory_bytes(self, tokens: int) -> int:
        return 1


class Served:
    """A client of an engine that is served with one context, of a book."""

    def __init__(self, engine: Echo, book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        speaker = Speaker(engine, lambda: OWNER, Sizes())  # type: ignore[arg-type]
        monkeypatch.setattr(server, "load_speaker", lambda *_, **__: speaker)
        settings = server.Settings(
            "model", None, None, "tiny", "127.0.0.1", 0, (), Sampling(), Limits(4000, 100), 2, 4,
            10**6, {"book": book},
        )  # fmt: skip
        contexts: dict[str, Context] = {}
        self.scheduler = Scheduler(
            lambda: server._loaded(settings, contexts), parallel=2, waiting=4
        )
        self.scheduler.start()
        service = Service(
            self.scheduler, engine, "tiny", 256, settings.limits, Sampling(), contexts
        )
        self._client = testclient.TestClient(build(service))

    def post(self, route: str, **body: Any) -> Any:
        answer = self._post(route, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(self, route: str, **body: Any) -> Any:
        answer = self._post(route, **body)
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]

    def _post(self, route: str, **body: Any) -> Any:
        return self._client.post(f"/v1/{route}", json={"max_tokens": 4, **body})


@pytest.fixture
def yesterdays_book(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an engine that is told the day has read the day before."""
    with monkeypatch.context() as patch:
        patch.setattr(conversations, "clock", lambda: datetime.now() - timedelta(days=1))
        reader = Conversation(Echo(dated=True))
        reader.read(DOCUMENT)
    return write(reader, tmp_path / "book", reader.began)


def write(reader: Conversation, path: Path, began: datetime | None) -> Path:
    now = reader.snapshot()
    arrays = reader.engine.arrays(now.state)
    write_state(path, SavedState(OWNER, now.messages, now.tokens, arrays, began), force=True)
    return path


@pytest.fixture
def engine() -> Echo:
    return Echo(dated=True)


@pytest.fixture
def served(
    engine: Echo, yesterdays_book: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Served]:
    running = Served(engine, yesterdays_book, monkeypatch)
    yield running
    running.scheduler.close()


def test_a_context_stays_on_its_day(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    usage = served.post("chat/completions", model="tiny:book", messages=[QUESTION])["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > len(DOCUMENT)
    assert usage["prompt_tokens"] - len(DOCUMENT) < 60
    # Without one it is today, of which nothing is known.
    usage = served.post("chat/completions", messages=[QUESTION])["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert "reads everything again" not in capsys.readouterr().err


def test_a_context_that_does_not_fit_is_named(
    engine: Echo, yesterdays_book: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A file from before days were kept does not say which one it was."""
    old = Speaker(engine, lambda: OWNER, Sizes()).loaded(yesterdays_book)  # type: ignore[arg-type]
    path = write(old, yesterdays_book, None)
    running = Served(engine, path, monkeypatch)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and str(path) in told and "reads everything again" in told
    usage = running.post("chat/completions", model="tiny:book", messages=[QUESTION])["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    running.scheduler.close()


def test_completions_go_on_and_answers_begin(served: Served, engine: Echo) -> None:
    served.post("completions", prompt="Once upon")
    served.post("chat/completions", messages=[QUESTION])
    assert engine.continued == [True, False]


@pytest.mark.parametrize("stop", [["x"] * 17, "x" * 1001, ["y", "x" * 1001]])
def test_stop_strings_are_few_and_short(served: Served, stop: Any) -> None:
    """All are looked for at every token, in the thread that all answers wait for."""
    for route, asked in (
        ("completions", {"prompt": "Once"}),
        ("chat/completions", {"messages": [QUESTION]}),
    ):
        error = served.refused(route, stop=stop, **asked)
        assert error["param"] == "stop"
        assert "16 texts of 1,000 characters" in error["message"]
        served.post(route, stop=["x" * 1000] * 16, **asked)


def test_more_answers_than_places_are_refused_unread(
    served: Served, engine: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "encode", lambda text: pytest.fail("read"))
    for route, asked, count in (
        ("completions", {"prompt": ["Once"] * 7}, 7),
        ("completions", {"prompt": ["Once"] * 2, "n": 4}, 8),
        ("chat/completions", {"messages": [QUESTION], "n": 8}, 8),
    ):
        assert f"asks for {count} answers" in served.refused(route, **asked)["message"]


class Panic(BaseException):
    """As native code's, which is no Exception."""


class Slow(Echo):
    """Takes seconds for each token but the first; panics at less than none."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def generate(self, *arguments: Any, **more: Any) -> Generator[tuple[int, str]]:
        for said in super().generate(*arguments, **more):
            yield said
            if self.seconds < 0:
                raise Panic("index out of bounds")
            time.sleep(self.seconds)


def serve_slowly(folder: str, seconds: float) -> None:
    """``supra serve`` of such an engine, in a process of its own; it ends clients after 1 s."""
    speaker = Speaker(Slow(seconds), lambda: OWNER, Sizes())  # type: ignore[arg-type]
    server.load_speaker = lambda *_, **__: speaker  # type: ignore[assignment]
    server._GRACE = 1
    app(["serve", folder, "--port", "0"])


class Process:
    """:func:`serve_slowly` on its way; leaving it ends it."""

    def __init__(self, folder: Path, seconds: float) -> None:
        pytest.importorskip("tokenizers")
        model, self._log = write_model(folder / "model"), folder / "log"
        program = f"from {__name__} import serve_slowly; serve_slowly({str(model)!r}, {seconds})"
        with open(self._log, "w") as file:
            self._process = subprocess.Popen([sys.executable, "-c", program], stderr=file)

    def __enter__(self) -> Process:
        while not (place := re.search(r" at (http://\S+)\n", self.told)):
            assert self._process.poll() is None, self.told
            time.sleep(0.05)
        self.url = place[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    @property
    def told(self) -> str:
        """The log."""
        return self._log.read_text()

    def interrupt(self, times: int) -> None:
        for number in range(times):
            time.sleep(0.3 * (number > 0))
            self._process.send_signal(signal.SIGINT)

    def wait(self) -> int:
        return self._process.wait(60)


@pytest.mark.parametrize(("seconds", "times"), [(2.0, 1), (1.0, 3)])
def test_ctrl_c_waits_for_the_step_under_way(tmp_path: Path, seconds: float, times: int) -> None:
    """A long one, too, and Ctrl-C again: the stream says why it ends, the log has no traceback."""
    body = json.dumps({"prompt": "Once", "max_tokens": 50, "stream": True}).encode()
    with Process(tmp_path, seconds) as process:
        asked = Request(process.url + "/completions", body, {"Content-Type": "application/json"})
        with urlopen(asked, timeout=60) as answer:
            lines = [next(line for line in answer if line.startswith(b"data: "))]
            process.interrupt(times)
            lines += [line for line in answer if line.startswith(b"data: ")]
        assert process.wait() == 130
        assert "Traceback" not in process.told and "ERROR" not in process.told
    assert json.loads(lines[-1][6:])["error"]["message"].startswith("the server is stopping")


@pytest.mark.parametrize("times", [1, 2])
def test_a_client_that_says_no_more_is_cut_off(tmp_path: Path, times: int) -> None:
    """After some seconds, at another Ctrl-C at once; it is not worth a traceback."""
    with Process(tmp_path, 0.0) as process:
        address = urlsplit(process.url)
        with socket.create_connection((address.hostname, address.port)) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
                b"Content-Type: application/json\r\n\r\n{"
            )
            time.sleep(0.5)
            process.interrupt(times)
            assert process.wait() == 130
        assert "Traceback" not in process.told


@pytest.mark.parametrize("asked", [{"stream": True}, {}])
def test_a_panic_ends_the_server_with_a_sentence(tmp_path: Path, asked: dict[str, bool]) -> None:
    body = json.dumps({"prompt": "Once", "max_tokens": 50, **asked}).encode()
    says = "the model's thread has ended by an error (Panic: index out of bounds)"
    with Process(tmp_path, -1) as process:
        sent = Request(process.url + "/completions", body, {"Content-Type": "application/json"})
        try:
            with urlopen(sent, timeout=60) as answer:
                code, told = answer.status, answer.read().decode()
        except HTTPError as error:
            code, told = error.code, error.read().decode()
        assert says in told and ("stream" in asked or code == 503)
        assert process.wait() == 1
        assert process.told.endswith(f"supra: error: {says}: start the server again\n")
        assert "Traceback" not in process.told


def test_the_model_ends_whatever_ends_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    speaker, schedulers = Speaker(Echo(), lambda: OWNER, Sizes()), []  # type: ignore[arg-type]

    def broken(service: Service, *_: Any) -> None:
        schedulers.append(service.scheduler)
        assert not service.scheduler.ended
        raise RuntimeError("broken")

    monkeypatch.setattr(server, "load_speaker", lambda *_, **__: speaker)
    monkeypatch.setattr(server, "_serve", broken)
    settings = server.Settings(
        str(write_model(tmp_path / "model")), None, None, "tiny", "127.0.0.1", 0, (), Sampling(),
        Limits(4000, 100), 2, 4, 10**6, {},
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="broken"):
        server.serve(settings)
    assert schedulers[0].ended


def test_the_command_line_reaches_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(server, "serve", told.append)
    monkeypatch.setattr(server, "load_speaker", lambda *_, **more: told.append(more) or speaker)
    speaker = Speaker(Echo(), lambda: OWNER, Sizes())  # type: ignore[arg-type]
    for given, origins, markers in (
        ((), (), False),
        (("--parse-markers", "--allow-origin", "*"), ("*",), True),
        (("--allow-origin", "http://localhost:3000", "--allow-origin", "null"),
         ("http://localhost:3000", "null"), False),
    ):  # fmt: skip
        done = CliRunner().invoke(app, ["serve", "model", *given])
        assert done.exit_code == 0, done.output
        settings = told.pop()
        assert (settings.origins, settings.parse_markers) == (origins, markers)
        server._loaded(settings, {})
        assert told.pop() == {"parse_markers": markers}


@pytest.mark.parametrize(
    "origin",
    ["localhost:3000", "http://localhost:3000/", "http://a.example/x", "HTTP://a.example", "",
     "http://me@a.example", "http://[", "//a.example"],
)  # fmt: skip
def test_what_is_no_origin(origin: str) -> None:
    done = CliRunner().invoke(app, ["serve", "model", "--allow-origin", origin])
    assert done.exit_code == 2
    assert "is not an origin: write it like http" in done.output
