"""Requests that mean harm, from a process of their own: tests.cli.storm URL KEY COUNT."""

from __future__ import annotations

import json
import random
import socket
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

# Seconds for which an answer is waited for.
_PATIENCE = 120
# Characters of the longest body that the server takes, and of a prompt that it answers.
_BODY, _LONG = 900_000, 3_000


class Storm:
    """A client with a key of its own. ``held``: connections that it leaves open."""

    def __init__(self, url: str, key: str) -> None:
        address = urlsplit(url)
        self._address, self._key = (address.hostname, address.port), key
        self.held: list[socket.socket] = []
        self.kinds: list[Callable[[random.Random], str]] = [
            self.too_large, self.too_many_tokens, self.too_long_a_talk, self.too_many_ids,
            self.half_open, self.slow_body, self.leaves, self.leaves_at_once, self.wrong_key,
            self.many_stops, self.many_answers, self.long_prompt, self.garbage, self.two_lengths,
        ]  # fmt: skip

    def too_large(self, chance: random.Random) -> str:
        return self._ask("completions", {"prompt": "x" * (2 * _BODY)})

    def too_many_tokens(self, chance: random.Random) -> str:
        return self._ask("completions", {"prompt": "ab c" * (_BODY // 4)})

    def too_long_a_talk(self, chance: random.Random) -> str:
        talk = [{"role": "user", "content": "ab c" * (_BODY // 4)}]
        return self._ask("chat/completions", {"messages": talk})

    def too_many_ids(self, chance: random.Random) -> str:
        return self._ask("completions", {"prompt": [7] * (_BODY // 4)})

    def half_open(self, chance: random.Random) -> str:
        return self._hold(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-")

    def slow_body(self, chance: random.Random) -> str:
        return self._hold(self._head("completions", 1000) + b'{"prompt": "')

    def leaves(self, chance: random.Random) -> str:
        body = {"prompt": f"once {chance.random()}", "stream": True, "max_tokens": 1000}
        with self._send("completions", body) as client:
            client.recv(500)
        return "left"

    def leaves_at_once(self, chance: random.Random) -> str:
        with self._send("completions", {"prompt": "ab c" * 2000}):
            return "left"

    def wrong_key(self, chance: random.Random) -> str:
        return self._ask("completions", {"prompt": "x" * 1000}, key="none")

    def many_stops(self, chance: random.Random) -> str:
        stops = [letter * 1000 for letter in "abcdefghijklmnop"]
        return self._ask("completions", {"prompt": "once", "stop": stops, "max_tokens": 50})

    def many_answers(self, chance: random.Random) -> str:
        body = {"prompt": "once", "n": 8, "temperature": 1, "max_tokens": 50, "logprobs": 5}
        return self._ask("completions", body)

    def long_prompt(self, chance: random.Random) -> str:
        text = "".join(chance.choices("abc def", k=_LONG))
        return self._ask("completions", {"prompt": text, "max_tokens": 2})

    def garbage(self, chance: random.Random) -> str:
        return self._raw(chance.randbytes(200) + b"\r\n\r\n")

    def two_lengths(self, chance: random.Random) -> str:
        head = self._head("completions", 5).removesuffix(b"\r\n")
        return self._raw(head + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n")

    def _head(self, route: str, length: int, key: str | None = None) -> bytes:
        return (
            f"POST /v1/{route} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n"
            f"Content-Type: application/json\r\nAuthorization: Bearer {key or self._key}\r\n\r\n"
        ).encode()

    def _connect(self) -> socket.socket:
        return socket.create_connection(self._address, _PATIENCE)

    def _send(self, route: str, body: Any, key: str | None = None) -> socket.socket:
        content = json.dumps(body).encode()
        client = self._connect()
        client.sendall(self._head(route, len(content), key) + content)
        return client

    def _ask(self, route: str, body: Any, key: str | None = None) -> str:
        with self._send(route, body, key) as client:
            return client.recv(12)[9:].decode()

    def _raw(self, content: bytes) -> str:
        with self._connect() as client:
            client.sendall(content)
            return client.recv(12)[9:].decode()

    def _hold(self, content: bytes) -> str:
        client = self._connect()
        client.sendall(content)
        self.held.append(client)
        return "held"


def main(url: str, key: str, count: int) -> None:
    """Prints what came of each kind."""
    storm = Storm(url, key)

    def one(index: int) -> str:
        kind = storm.kinds[index % len(storm.kinds)]
        try:
            told = kind(random.Random(index))
        except OSError as error:
            told = type(error).__name__
        return f"{kind.__name__} {told}"

    with ThreadPoolExecutor(24) as pool:
        print(json.dumps(Counter(pool.map(one, range(count)))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
