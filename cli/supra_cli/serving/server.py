"""Bind an address, load the model, and serve until interrupted."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from supra_cli.serving.app import build
from supra_cli.serving.connections import BACKLOG, Connection, doors
from supra_cli.serving.service import Context, Limits, Service
from supra_cli.shared.output import log
from supra_cli.shared.speech import load_speaker, release_thread
from supra_core.errors import SupraError
from supra_core.runtime.engine import Engine
from supra_core.runtime.prefixes import Prefixes
from supra_core.runtime.sampling import Sampling
from supra_core.runtime.scheduler import Scheduler
from supra_core.runtime.state_file import read_state
from supra_core.sources.source import open_source
from supra_core.text.worker import trim

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
# Seconds for clients to read the ends of their answers after the server is stopped.
_GRACE = 3
# Tenths of a second after which memory of long requests is given back.
_TRIM = 30


@dataclass(frozen=True)
class Settings:
    """What to serve, where, and within which limits. ``contexts``: state files by name."""

    model: str
    backend: str | None
    dtype: str | None
    name: str
    host: str
    port: int
    keys: Sequence[str]
    sampling: Sampling
    limits: Limits
    parallel: int
    waiting: int
    kept_bytes: int
    contexts: Mapping[str, Path]
    origins: tuple[str, ...] = ()
    parse_markers: bool = False
    share_states: bool = False

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return self.host in _LOOPBACK


def serve(settings: Settings) -> None:
    """Serve until Ctrl-C or SIGTERM; SupraError for a bad model, context or address.

    :class:`~supra_core.runtime.scheduler.Broken` when the model's thread ends by itself.
    """
    for path in settings.contexts.values():
        # Checked before the model is loaded, which takes longer.
        read_state(path)
    with _bound(settings.host, settings.port) as listening:
        contexts: dict[str, Context] = {}
        scheduler = Scheduler(
            partial(_loaded, settings, contexts),
            parallel=settings.parallel,
            waiting=settings.waiting,
            # With one key, or on one machine, there is one client.
            compete=len(settings.keys) > 1 or not (settings.keys or settings.loopback),
            release=release_thread,
        )
        engine = scheduler.start()
        try:
            _serve(_service(settings, scheduler, engine, contexts), listening)
        finally:
            scheduler.close()
        if scheduler.broken:
            raise scheduler.broken


def _service(
    settings: Settings, scheduler: Scheduler, engine: Engine, contexts: Mapping[str, Context]
) -> Service:
    if not settings.loopback and not settings.keys:
        log("anyone who can reach this address may use the model: require a key with --api-key")
    return Service(
        scheduler,
        engine,
        settings.name,
        open_source(settings.model).spec.vocab_size,
        settings.limits,
        settings.sampling,
        contexts,
        settings.keys,
        settings.share_states,
        _LOOPBACK if settings.loopback else None,
        settings.origins,
    )


def _serve(service: Service, listening: socket.socket) -> None:
    host, port = listening.getsockname()[:2]
    place = f"[{host}]" if ":" in host else host
    log(f"{' and '.join(service.models)} in {service.engine.backend} at http://{place}:{port}/v1")
    limits = doors(service.limits.body_bytes, one_address=service.hosts is not None)
    config = uvicorn.Config(
        _Quiet(build(service)),
        http=type("_Connection", (Connection,), {"doors": limits}),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_level="warning",
        access_log=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=_GRACE,
    )
    logging.getLogger("uvicorn.error").addFilter(service.seldom)
    _Server(config, service).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Ends every answer, after the current step, before it closes connections."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._scheduler = service, service.scheduler

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen."""
        asyncio.get_running_loop().set_exception_handler(self._service.seldom.heard)
        await super().startup(sockets)

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; it also stops when the model's thread has ended."""
        if counter % _TRIM == 0 and self._service.had_long:
            self._service.had_long = False
            await asyncio.to_thread(trim)
        return await super().on_tick(counter) or self._scheduler.ended

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On Ctrl-C or SIGTERM; a second one shortens the wait after the current step."""
        self._scheduler.stop()
        if not self.should_exit or self._scheduler.ended:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the model's thread first: it delivers to this loop, and must finish its step."""
        if not self._scheduler.ended:
            log("stopping after the current step")
        await asyncio.to_thread(self._scheduler.close)
        await super().shutdown(sockets)


class _Quiet:
    """An application without uvicorn's traceback for tasks that uvicorn cancelled itself."""

    def __init__(self, app: Starlette) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        with suppress(asyncio.CancelledError):
            await self._app(scope, receive, send)


def _loaded(settings: Settings, contexts: dict[str, Context]) -> tuple[Engine, Prefixes]:
    """The engine and its cached states; fills ``contexts``, whose states are among them."""
    speaker = load_speaker(
        settings.model, settings.backend, settings.dtype, parse_markers=settings.parse_markers
    )
    prefixes = Prefixes(settings.kept_bytes, speaker.sizes.memory_bytes)
    for name, path in settings.contexts.items():
        conversation = speaker.loaded(path)
        prefixes.pin(conversation.tokens, conversation.state)
        contexts[name] = Context(tuple(conversation.messages), conversation.began)
    return speaker.engine, prefixes


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    # TypeError for an invalid host name.
    except (OSError, OverflowError, TypeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SupraError(
            f"cannot listen on {host}:{port} ({reason}): use another --host or --port"
        ) from None
