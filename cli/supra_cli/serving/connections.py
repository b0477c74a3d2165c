"""Connections: how many may be open, and how long a client may take."""

from __future__ import annotations

import asyncio
import resource
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# Open files besides connections, and connections accepted at once.
_OTHER_FILES, BACKLOG = 128, 64
# Connections at a time, if the system allows a process as many files.
_MOST = 512


@dataclass(eq=False)
class Doors:
    """The connections of a server, the oldest first, and their limits.

    ``most`` at a time, at most ``own`` of them from one address. Time limits in seconds: for the
    ``headers`` (since the connection or the previous answer), for the ``body`` after them, and for
    the client to read what was ``written``.
    """

    most: int
    own: int
    headers: float = 10
    body: float = 60
    written: float = 60
    open: dict[Connection, None] = field(default_factory=dict)

    def admit(self, new: Connection) -> bool:
        """Whether there is room; an idle connection is closed to make some.

        So idle connections can only displace each other.
        """
        own = [one for one in self.open if one.address == new.address]
        if len(self.open) < self.most and len(own) < self.own:
            return True
        rivals = own if len(own) >= self.own else list(self.open)
        idle = next((one for one in rivals if one.is_waiting), None)
        if idle is not None:
            idle.give_up()
        return idle is not None


def doors(body_bytes: int, *, one_address: bool) -> Doors:
    """As many as the system allows; ``one_address``: all clients have the same address."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST + BACKLOG + _OTHER_FILES
    if soft < wanted:
        # The default on macOS is 256.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(16, min(_MOST, soft - BACKLOG - _OTHER_FILES))
    # For a line of 64 KiB/s.
    seconds = 30 + body_bytes / 2**16
    return Doors(most, most if one_address else most // 4, body=seconds)


class Connection(H11Protocol):
    """uvicorn's connection with deadlines for headers, bodies and readers."""

    doors: Doors

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        self.timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._awaited: Any = None
        admitted = self.doors.admit(self)
        self.doors.open[self] = None
        if not admitted:
            transport.write(_FULL)
            transport.close()
        self._wait_for(h11.IDLE, self.doors.headers)

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has disconnected."""
        self.doors.open.pop(self, None)
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for the rest of a request, or for the next one."""
        return self.timer is not None

    def give_up(self) -> None:
        """Close it at once."""
        self.doors.open.pop(self, None)
        self._stop_waiting()
        self.transport.abort()

    def handle_events(self) -> None:
        """Data has arrived."""
        super().handle_events()
        self._look()

    def on_response_complete(self) -> None:
        """The answer is written."""
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        """The client does not read at the moment."""
        super().pause_writing()
        self._writing = self.loop.call_later(self.doors.written, self.give_up)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _look(self) -> None:
        """Start the timer for what the client must send next; single bytes do not restart it."""
        state = self.conn.their_state
        if state is h11.IDLE:
            self._wait_for(state, self.doors.headers)
        elif state is h11.SEND_BODY:
            self._wait_for(state, self.doors.body)
        elif self.transport.is_closing():
            self._wait_for(state, self.doors.written)
        else:
            self._stop_waiting()

    def _wait_for(self, what: Any, seconds: float) -> None:
        if self._awaited is what:
            return
        self._stop_waiting()
        self._awaited, self.timer = what, self.loop.call_later(seconds, self.give_up)

    def _stop_waiting(self) -> None:
        self._awaited = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


_BODY = (
    b'{"error": {"message": "too many connections: try again later", '
    b'"type": "server_error", "param": null, "code": null}}'
)
_FULL = b"".join(
    (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(_BODY),
        _BODY,
    )
)
