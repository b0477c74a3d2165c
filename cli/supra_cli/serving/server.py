"""Binding an address, loading the model, and serving until interrupted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from supra_cli.output import log
from supra_cli.serving.app import build
from supra_cli.serving.service import Context, Limits, Service
from supra_cli.speech import load_speaker, release_thread
from supra_core.conversation import Engine
from supra_core.errors import SupraError
from supra_core.formats.state_file import read_state
from supra_core.generate import Sampling
from supra_core.prefixes import Prefixes
from supra_core.scheduler import Scheduler
from supra_core.sources import open_source

_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
# Seconds that answers under way have to end, once the server is told to.
_GRACE = 3


@dataclass(frozen=True)
class Settings:
    """What to serve, where, and how much of it. ``contexts``: state files by name."""

    model: str
    backend: str | None
    dtype: str | None
    name: str
    host: str
    port: int
    key: str | None
    sampling: Sampling
    limits: Limits
    parallel: int
    waiting: int
    kept_bytes: int
    contexts: Mapping[str, Path]


def serve(settings: Settings) -> None:
    """Serve until Ctrl-C or SIGTERM; SupraError when model, context or address will not do."""
    for path in settings.contexts.values():
        # Before the model is loaded, which takes longer.
        read_state(path)
    with _bound(settings.host, settings.port) as listening:
        contexts: dict[str, Context] = {}
        scheduler = Scheduler(
            partial(_loaded, settings, contexts),
            parallel=settings.parallel,
            waiting=settings.waiting,
            release=release_thread,
        )
        engine = scheduler.start()
        loopback = settings.host in _LOOPBACK
        service = Service(
            scheduler,
            engine,
            settings.name,
            open_source(settings.model).spec.vocab_size,
            settings.limits,
            settings.sampling,
            contexts,
            settings.key,
            _LOOPBACK if loopback else None,
        )
        if not loopback and settings.key is None:
            log("anyone who reaches this address may use the model: --api-key asks for a key")
        host, port = listening.getsockname()[:2]
        place = f"[{host}]" if ":" in host else host
        log(f"{' and '.join(service.models)} in {engine.backend} at http://{place}:{port}/v1")
        _serve(service, listening)


def _serve(service: Service, listening: socket.socket) -> None:
    app = build(service)
    app.router.lifespan_context = partial(_lifespan, service)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE
    )
    _Server(config, service.scheduler).run(sockets=[listening])


class _Server(uvicorn.Server):
    """Answers under way are told to end before their connections are."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self._scheduler = scheduler

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """At Ctrl-C or SIGTERM."""
        self._scheduler.stop()
        super().handle_exit(sig, frame)


@asynccontextmanager
async def _lifespan(service: Service, app: Starlette) -> AsyncIterator[None]:
    yield
    # The model's thread delivers to this loop: it ends first.
    await asyncio.to_thread(service.scheduler.close)


def _loaded(settings: Settings, contexts: dict[str, Context]) -> tuple[Engine, Prefixes]:
    """The model and the states kept for it; fills in ``contexts``, whose states are among them."""
    speaker = load_speaker(settings.model, settings.backend, settings.dtype)
    prefixes = Prefixes(settings.kept_bytes, speaker.sizes.memory_bytes)
    for name, path in settings.contexts.items():
        conversation = speaker.loaded(path)
        prefixes.pin(conversation.tokens, conversation.state)
        contexts[name] = Context(tuple(conversation.messages), conversation.began)
    return speaker.engine, prefixes


def _bound(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SupraError(
            f"cannot listen at {host}:{port} ({reason}): give another --host or --port"
        ) from None
