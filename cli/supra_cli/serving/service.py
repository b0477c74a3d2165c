"""A served model: names, limits, and how requests become jobs and events."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from supra_cli.serving.quiet import Seldom
from supra_cli.serving.schema import ApiError, ChatMessage, ChatRequest, CompletionRequest
from supra_core.errors import SupraError
from supra_core.runtime.engine import Engine, Message
from supra_core.runtime.sampling import Sampling
from supra_core.runtime.scheduler import (
    Busy,
    Event,
    Failed,
    Finished,
    Job,
    Places,
    Scheduler,
    Stopping,
)
from supra_core.text import Rendering
from supra_core.text.worker import LONG

Listener = Callable[[Event], None]
T = TypeVar("T")

# Characters to tokenise at a time where a text may have too many tokens, and the tokens that a cut
# can add.
_SLICE, _CUT = 50_000, 8


@dataclass(frozen=True)
class Limits:
    """Upper limits of prompts and answers in tokens, and of request bodies in bytes."""

    prompt_tokens: int
    answer_tokens: int

    @property
    def body_bytes(self) -> int:
        """Room for the longest prompt: few tokens have more than 16 bytes, JSON included."""
        return max(2**16, 16 * self.prompt_tokens)

    @property
    def own_bytes(self) -> int:
        """Limit of all bodies that one client sends at a time."""
        return 16 * self.body_bytes

    @property
    def all_bytes(self) -> int:
        """Limit of all bodies at a time."""
        return 4 * self.own_bytes


@dataclass(frozen=True)
class Context:
    """Messages before a request's own, and the time that the chat template was given."""

    messages: tuple[Message, ...] = ()
    began: datetime | None = None


@dataclass
class Service:
    """``contexts``: transcripts with cached states, by the name after the colon.

    ``keys``: each is a client; without keys, each address is. ``shared``: clients reuse each
    other's states, and so can tell how other prompts begin.
    """

    scheduler: Scheduler
    engine: Engine
    name: str
    vocab_size: int
    limits: Limits
    usual: Sampling
    contexts: Mapping[str, Context] = field(default_factory=dict)
    keys: Sequence[str] = ()
    shared: bool = False
    # Host names that requests may use; None: any.
    hosts: frozenset[str] | None = None
    # Web origins that may use it; *: any.
    origins: tuple[str, ...] = ()
    started: int = field(default_factory=lambda: int(time.time()))
    seldom: Seldom = field(default_factory=Seldom)
    # Whether a long request has left memory to give back to the system.
    had_long: bool = False
    _received: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._short, self._long = Lane("short texts"), Lane("long texts")

    @property
    def models(self) -> list[str]:
        """Names for requests: the model, and the model with each context."""
        return [self.name, *(f"{self.name}:{context}" for context in self.contexts)]

    def context(self, model: str | None) -> Context:
        """The context of a model name; :class:`ApiError` 404 for an unknown one."""
        if model is None or model == self.name:
            return Context()
        if model not in self.models:
            raise ApiError(
                404,
                f"there is no model '{model}': use {' or '.join(self.models)}",
                param="model",
                code="model_not_found",
            )
        return self.contexts[model.removeprefix(f"{self.name}:")]

    def check_answers(self, count: int) -> None:
        """:class:`ApiError` 400 when a request asks for more answers than there are places."""
        places = self.scheduler.own_places
        if count > places:
            raise ApiError(
                400,
                f"the request asks for {count:,} answers, and this server has places for "
                f"{places:,}: ask for fewer",
            )

    @contextmanager
    def receiving(self, client: str) -> Iterator[Callable[[int], None]]:
        """Counts received bytes of a body; ApiError 429 when clients send too much at a time."""
        held = 0

        def take(count: int) -> None:
            nonlocal held
            held += count
            self._received[client] += count
            all_of_them = self._received.total() > self.limits.all_bytes
            if all_of_them or self._received[client] > self.limits.own_bytes:
                who = "all clients together send" if all_of_them else "you send"
                raise ApiError(
                    429, f"{who} too much at a time: try again later", kind="rate_limit_error",
                    code="rate_limit_exceeded",
                )  # fmt: skip

        try:
            yield take
        finally:
            self._received[client] -= held
            if not self._received[client]:
                del self._received[client]

    async def in_turn(
        self, client: str, size: int, is_gone: Callable[[], Awaitable[bool]], work: Callable[[], T]
    ) -> T | None:
        """The result of ``work`` in another thread, one request of a client at a time.

        ``size``: of the request, in characters, by which it is queued. None if the client left.
        """
        lane = self._short if size <= LONG else self._long
        try:
            return await lane.turn(client, is_gone, work)
        finally:
            self.had_long |= size > LONG

    def owner(self, asked: ChatRequest | CompletionRequest, client: str) -> str:
        """The owner of the states that a request leaves."""
        return "" if self.shared else asked.owner(client)

    def rendered(
        self, context: Context, messages: Sequence[ChatMessage], how: Rendering
    ) -> list[int]:
        """Token ids by the chat template; SupraError when it refuses the messages."""
        told = [message.plain() for message in messages]

        def render(told: Sequence[Message]) -> list[int]:
            return self.engine.render([*context.messages, *told], context.began, how)

        if any(message.uses_tools for message in messages):
            return self._checked(_with_tools(told, render))
        return self._checked(render(told))

    def encoded(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a text as it stands, or the ids given."""
        if isinstance(prompt, str):
            self._check_long(prompt)
            return self._checked(self.engine.encode(prompt))
        self._check_count(len(prompt))
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
        self._check_count(len(ids))
        return ids

    def _check_count(self, count: int, at_least: str = "") -> None:
        most = self.limits.prompt_tokens
        if count > most:
            raise ApiError(
                400,
                f"the prompt has {at_least}{count:,} tokens, this server takes {most:,}: shorten "
                "it",
                code="context_length_exceeded",
            )

    def _check_long(self, text: str) -> None:
        """Refuse a text as soon as it has too many tokens, without tokenising the rest."""
        if len(text) <= max(_SLICE, self.limits.prompt_tokens):
            return
        count = 0
        for start in range(0, len(text), _SLICE):
            found = len(self.engine.encode(text[start : start + _SLICE]))
            count += max(0, found - _CUT)
            self._check_count(count, "more than ")


class Lane:
    """A thread for long work, in which clients take turns."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def turn(
        self, client: str, is_gone: Callable[[], Awaitable[bool]], work: Callable[[], T]
    ) -> T | None:
        """The result of ``work``, in the client's turn; None if the client left."""
        lock = self._turns.get(client) or self._turns.setdefault(client, asyncio.Lock())
        async with lock:
            if await is_gone():
                return None
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class Exchange:
    """The jobs of a request and their events; leaving it cancels running jobs."""

    def __init__(self, places: Places, jobs: Sequence[Callable[[Listener], Job]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._jobs: list[Job] = []
        for index, make in enumerate(jobs):
            job = make(self._listener(index))
            try:
                places.submit(job)
            except Stopping:
                self.cancel()
                raise
            self._jobs.append(job)

    async def events(self) -> AsyncGenerator[tuple[int, Event]]:
        """Events with the index of their job, until all jobs have ended."""
        left = len(self._jobs)
        try:
            while left:
                index, event = await self._events.get()
                left -= isinstance(event, Finished | Failed)
                yield index, event
        finally:
            self.cancel()

    def cancel(self) -> None:
        """Cancel all jobs."""
        for job in self._jobs:
            job.cancel()

    def _listener(self, index: int) -> Listener:
        def listen(event: Event) -> None:
            # After a crash of the server, the loop may be closed already.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return listen


def _with_tools(
    told: Sequence[Message], render: Callable[[Sequence[Message]], list[int]]
) -> list[int]:
    """Token ids of messages with tools; ApiError if the chat template does not show tools.

    Some templates expect the arguments of a call as text.
    """
    try:
        try:
            ids = render(told)
        except SupraError:
            told = [_changed(message, _as_text) for message in told]
            ids = render(told)
        # A template without tools may silently drop them.
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
            400, "the model's chat template drops tools: send messages without tools",
            param="messages",
        )  # fmt: skip
    return ids


def _as_text(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _renamed(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "name": function["name"] + "x"}


def _changed(message: Message, change: Callable[[Any], Any]) -> Message:
    """The message with its functions changed."""
    if not message.get("tool_calls"):
        return message
    calls = [{**call, "function": change(call["function"])} for call in message["tool_calls"]]
    return {**message, "tool_calls": calls}


def failure(error: BaseException) -> ApiError:
    """The error as the client gets it; the text of internal errors goes to the log only."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), kind="rate_limit_error", code="rate_limit_exceeded")
    if isinstance(error, Stopping):
        return ApiError(503, str(error), kind="server_error")
    if isinstance(error, SupraError):
        return ApiError(400, str(error))
    return ApiError(500, "the server failed on this request: see its log", kind="server_error")
