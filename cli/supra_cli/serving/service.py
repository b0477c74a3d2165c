"""A served model: its names, its limits, and requests turned into jobs and their events."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from supra_cli.serving.schema import ApiError, ChatMessage
from supra_core.conversation import Engine, Message
from supra_core.errors import SupraError
from supra_core.generate import Sampling
from supra_core.scheduler import Busy, Event, Failed, Finished, Job, Scheduler, Stopping
from supra_core.text import Rendering

Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Limits:
    """Tokens a prompt may have, tokens an answer may have, and bytes of a request's body."""

    prompt_tokens: int
    answer_tokens: int

    @property
    def body_bytes(self) -> int:
        """Room for the longest prompt: few tokens have more than 16 bytes, JSON included."""
        return max(2**16, 16 * self.prompt_tokens)


@dataclass(frozen=True)
class Context:
    """What stands before a request's messages, and the time that its template was told."""

    messages: tuple[Message, ...] = ()
    began: datetime | None = None


@dataclass
class Service:
    """``contexts``: transcripts whose states are kept, by the name that stands after a colon."""

    scheduler: Scheduler
    engine: Engine
    name: str
    vocab_size: int
    limits: Limits
    usual: Sampling
    contexts: Mapping[str, Context] = field(default_factory=dict)
    key: str | None = None
    # Hosts that a browser may have been told to reach it by; None: any.
    hosts: frozenset[str] | None = None
    # Pages of these may use it from a browser; *: of any.
    origins: tuple[str, ...] = ()
    started: int = field(default_factory=lambda: int(time.time()))
    # A tokenizer is not made for several threads.
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def models(self) -> list[str]:
        """What a request may name: the model, and the model with each of its contexts."""
        return [self.name, *(f"{self.name}:{context}" for context in self.contexts)]

    def context(self, model: str | None) -> Context:
        """What stands before a request's messages; :class:`ApiError` 404 for an unknown model."""
        if model is None or model == self.name:
            return Context()
        if model not in self.models:
            raise ApiError(
                404,
                f"there is no model '{model}' here: use {' or '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        return self.contexts[model.removeprefix(f"{self.name}:")]

    def check_answers(self, count: int) -> None:
        """:class:`ApiError` 400 when a request asks for more answers than there are places."""
        places = self.scheduler.places
        if count > places:
            raise ApiError(
                400,
                f"the request asks for {count:,} answers, and this server has places for "
                f"{places:,}: ask for fewer",
            )

    def rendered(
        self, context: Context, messages: Sequence[ChatMessage], how: Rendering
    ) -> list[int]:
        """Token ids by the chat template; SupraError when it refuses the messages."""
        told = [message.plain() for message in messages]

        def render(told: Sequence[Message]) -> list[int]:
            return self.engine.render([*context.messages, *told], context.began, how)

        with self._lock:
            if any(message.uses_tools for message in messages):
                return self._checked(_with_tools(told, render))
            return self._checked(render(told))

    def encoded(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a text as it stands, or the ids given."""
        if isinstance(prompt, str):
            with self._lock:
                return self._checked(self.engine.encode(prompt))
        size = self.vocab_size
        wrong = next((token for token in prompt if not 0 <= token < size), None)
        if wrong is not None:
            raise ApiError(
                400, f"the model has no token {wrong}: ids go from 0 to {size - 1}", param="prompt"
            )
        return self._checked(list(prompt))

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise ApiError(400, "the prompt has no tokens: give some text", param="prompt")
        most = self.limits.prompt_tokens
        if len(ids) > most:
            raise ApiError(
                400,
                f"the prompt has {len(ids):,} tokens, this server takes {most:,}: shorten it",
                code="context_length_exceeded",
            )
        return ids


class Exchange:
    """A request's jobs and what happens to them; leaving it cancels what still runs."""

    def __init__(self, service: Service, jobs: Sequence[Callable[[Listener], Job]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._jobs: list[Job] = []
        for index, make in enumerate(jobs):
            job = make(self._listener(index))
            try:
                service.scheduler.submit(job)
            except Busy as error:
                self.cancel()
                raise ApiError(
                    429, str(error), kind="rate_limit_error", code="rate_limit_exceeded"
                ) from None
            except Stopping:
                self.cancel()
                raise
            self._jobs.append(job)

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """Each with the index of its job, until all have ended."""
        left = len(self._jobs)
        try:
            while left:
                index, event = await self._events.get()
                left -= isinstance(event, Finished | Failed)
                yield index, event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Nobody listens any more."""
        for job in self._jobs:
            job.cancel()

    def _listener(self, index: int) -> Listener:
        def listen(event: Event) -> None:
            # The loop is gone first where something broke the server.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return listen


def _with_tools(
    told: Sequence[Message], render: Callable[[Sequence[Message]], list[int]]
) -> list[int]:
    """What ``render`` makes of messages with tools; ApiError where the template has none.

    Some templates want the arguments of a call as text.
    """
    try:
        try:
            ids = render(told)
        except SupraError:
            told = [_changed(message, _as_text) for message in told]
            ids = render(told)
        # A template that does not know of tools may just leave them out.
        calls = [_changed(message, _renamed) for message in told]
        results = [
            {**message, "content": message["content"] + "x"}
            if message["role"] == "tool"
            else message
            for message in told
        ]
        lost = any(other != list(told) and render(other) == ids for other in (calls, results))
    except SupraError as error:
        raise ApiError(400, f"messages with tools: {error}", param="messages") from None
    if lost:
        raise ApiError(
            400, "the model's chat template leaves tools out: send messages without tools",
            param="messages",
        )  # fmt: skip
    return ids


def _as_text(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _renamed(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "name": function["name"] + "x"}


def _changed(message: Message, change: Callable[[Any], Any]) -> Message:
    """The message with other functions in its calls."""
    if not message.get("tool_calls"):
        return message
    calls = [{**call, "function": change(call["function"])} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def failure(error: Exception) -> ApiError:
    """What a client is told of an error: all of it only when it is one of its own making."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Stopping):
        return ApiError(503, str(error), kind="server_error")
    if isinstance(error, SupraError):
        return ApiError(400, str(error))
    return ApiError(500, "the server failed at this request: see its log", kind="server_error")
