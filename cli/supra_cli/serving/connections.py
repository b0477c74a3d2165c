"""Connections: how many there may be, and how long a client may take to say what it wants."""

from __future__ import annotations

import asyncio
import resource
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

# Files that a process has open beside connections, and connections that are taken at once.
_OTHER_FILES, BACKLOG = 128, 64
# Connections at a time, where the system lets a process have as many files.
_MOST = 512


@dataclass(eq=False)
class Doors:
    """The connections of a server, the oldest first, and their limits.

    ``most`` at a time, ``own`` of them from one address. Seconds: from the connection, or from the
    answer before, until the ``headers`` are there; then until the ``body`` is; and for the client
    to take what was written.
    """

    most: int
    own: int
    headers: float = 10
    body: float = 60
    written: float = 60
    open: dict[Connection, None] = field(default_factory=dict)

    def admit(self, new: Connection) -> bool:
        """Whether there is room; a client that has not yet asked for anything gives way.

        So connections that ask for nothing push out each other alone.
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
    """As many as the system allows; ``one_address``: everybody comes from the same."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST + BACKLOG + _OTHER_FILES
    if soft < wanted:
        # macOS has 256 for a start.
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(16, min(_MOST, soft - BACKLOG - _OTHER_FILES))
    # The slowest line has 64 KiB/s.
    seconds = 30 + body_bytes / 2**16
    return Doors(most, most if one_address else most // 4, body=seconds)


class Connection(H11Protocol):
    """uvicorn's, with deadlines: it waits for headers, bodies and readers as long as they take."""

    doors: Doors

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there."""
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
        """It has gone."""
        self.doors.open.pop(self, None)
        self._stop_waiting()
        self.resume_writing()
        super().connection_lost(exc)

    @property
    def is_waiting(self) -> bool:
        """Whether the client has yet to send the rest of a request, or a next one."""
        return self.timer is not None

    def give_up(self) -> None:
        """Close it at once, and forget it."""
        self.doors.open.pop(self, None)
        self._stop_waiting()
        self.transport.abort()

    def handle_events(self) -> None:
        """More of a request, or the next one."""
        super().handle_events()
        self._look()

    def on_response_complete(self) -> None:
        """The answer is written: the next request may come, or the rest of the last."""
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        """The client takes nothing for the time being."""
        super().pause_writing()
        self._writing = self.loop.call_later(self.doors.written, self.give_up)

    def resume_writing(self) -> None:
        """It takes something again."""
        super().resume_writing()
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None

    def _look(self) -> None:
        """Begin to wait for what the client has to send now; a byte now and then is none of it."""
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
    b'{"error": {"message": "this server has no more connections: try again later", '
    b'"type": "server_error", "param": null, "code": null}}'
)
_FULL = b"".join(
    (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(_BODY),
        _BODY,
    )
)
