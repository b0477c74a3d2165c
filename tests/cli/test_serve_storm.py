"""Honest clients beside hostile ones: their time, the server's memory, and whether it is there."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any
from urllib.parse import urlsplit

import pytest

pytest.importorskip("uvicorn")
pytest.importorskip("torch")

from tests.tiny_chat import write_model  # noqa: E402

HONEST = [f"honest {number}" for number in range(4)]
HOSTILE = "hostile"


class Server:
    """``supra serve`` with a key for each client, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        keys, self._log = folder / "keys", folder / "log"
        keys.write_text("\n".join([*HONEST, HOSTILE]))
        with open(self._log, "w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "supra_cli", "serve", str(write_model(folder / "model")),
                 "--backend", "torch", "--port", "0", "--api-keys", str(keys),
                 "--max-prompt", "60000", "--keep-gib", "0.001"],
                stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        while not (found := re.search(r" at (http://\S+)/v1", self.told)):
            assert self._process.poll() is None, self.told
            time.sleep(0.05)
        self.url = found[1]
        self._address = urlsplit(self.url)

    @property
    def told(self) -> str:
        return self._log.read_text()

    def ask(self, key: str, path: str, body: Any = None) -> Any:
        """The answer, which has to be one."""
        client = http.client.HTTPConnection(
            str(self._address.hostname), self._address.port, timeout=120
        )
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        client.request("POST" if body else "GET", path, json.dumps(body) if body else None, headers)
        answer = client.getresponse()
        told = json.loads(answer.read())
        client.close()
        assert answer.status == 200, told
        return told

    @property
    def memory(self) -> int:
        """Bytes of the process and its children."""
        pids = [self._process.pid]
        tasks = Path(f"/proc/{pids[0]}/task")
        pids += [
            int(p) for task in tasks.iterdir() for p in (task / "children").read_text().split()
        ]
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def storm(self, count: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.cli.storm", self.url, HOSTILE, str(count)],
            stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def stop(self) -> int:
        self._process.send_signal(signal.SIGINT)
        return self._process.wait(60)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    yield running
    assert running.stop() == 130
    assert "Traceback" not in running.told


class Honest(threading.Thread):
    """Asks one question after the other until it is told to stop, and says what each took."""

    def __init__(self, server: Server, key: str) -> None:
        super().__init__()
        self._server, self._key, self._ended = server, key, threading.Event()
        self.seconds: list[float] = []
        self.failed: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._ended.is_set():
                began = time.monotonic()
                # The model has no digits.
                number = "".join(chr(97 + int(digit)) for digit in str(len(self.seconds)))
                question = f"question {number} of {self._key} " + "and so on " * 20
                talk = [{"role": "user", "content": question}]
                body = {"messages": talk, "max_tokens": 40, "temperature": 1}
                self._server.ask(self._key, "/v1/chat/completions", body)
                self._server.ask(self._key, "/health")
                self.seconds.append(time.monotonic() - began)
        except BaseException as error:
            self.failed = error

    def end(self) -> list[float]:
        self._ended.set()
        self.join()
        if self.failed:
            raise self.failed
        return self.seconds


def asked(server: Server) -> list[Honest]:
    clients = [Honest(server, key) for key in HONEST]
    for client in clients:
        client.start()
    return clients


def undisturbed(server: Server, seconds: float) -> list[float]:
    clients = asked(server)
    time.sleep(seconds)
    return [taken for client in clients for taken in client.end()]


def stormed(server: Server, count: int) -> tuple[list[float], dict[str, int]]:
    storm, clients = server.storm(count), asked(server)
    told, _ = storm.communicate(timeout=1200)
    return [taken for client in clients for taken in client.end()], json.loads(told)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read in /proc")
@pytest.mark.slow  # It compares times, for which the machine has to be quiet.
@pytest.mark.parametrize(("count", "seconds"), [(42, 1.5), (1000, 20.0)])
def test_honest_clients_in_a_storm(server: Server, count: int, seconds: float) -> None:
    # What both are measured after: children started, every kind of request seen.
    stormed(server, 14)
    memory, before = server.memory, undisturbed(server, seconds)
    during, told = stormed(server, count)
    # Memory goes back within seconds.
    after = undisturbed(server, max(seconds / 2, 4))
    grown = server.memory - memory
    alone = mean(before + after)
    figures = (
        f"{count} hostile requests: {len(during)} honest ones took {mean(during):.3f} s, median "
        f"{median(during):.3f}, longest {max(during):.3f}; {len(before + after)} undisturbed "
        f"{alone:.3f}, median {median(before + after):.3f}, longest {max(before + after):.3f}; "
        f"ratio {mean(during) / alone:.2f}; memory {memory / 2**20:.0f} MiB, grown "
        f"{grown / 2**20:.1f}; log {len(server.told):,} bytes"
    )
    print(figures, *sorted(told.items()), sep="\n")
    assert mean(during) <= 2 * alone, figures
    assert grown < 64 * 2**20, figures
    # A line for each answer, and few for all that was refused.
    assert server.told.count("\n") < 4 * len(before + during + after) + 500, figures
