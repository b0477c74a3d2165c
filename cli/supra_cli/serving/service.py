"""A served model: its names, its limits, and requests turned into jobs and their events."""

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

# Characters of a text that are tokenised at once where it may have too many tokens, and tokens
# that a cut adds to them.
_SLICE, _CUT = 50_000, 8


@dataclass(frozen=True)
class Limits:
    """Tokens a prompt may have, tokens an answer may have, and bytes of a request's body."""

    prompt_tokens: int
    answer_tokens: int

    @property
    def body_bytes(self) -> int:
        """Room for the longest prompt: few tokens have more than 16 bytes, JSON included."""
        return max(2**16, 16 * self.prompt_tokens)

    @property
    def own_bytes(self) -> int:
        """Of bodies that one client sends at a time."""
        return 16 * self.body_bytes

    @property
    def all_bytes(self) -> int:
        """Of bodies that all clients send at a time."""
        return 4 * self.own_bytes


@dataclass(frozen=True)
class Context:
    """What stands before a request's messages, and the time that its template was told."""

    messages: tuple[Message, ...] = ()
    began: datetime | None = None


@dataclass
class Service:
    """``contexts``: transcripts whose states are kept, by the name that stands after a colon.

    ``keys``: each is a client of its own; without any, each address is. ``shared``: they use each
    other's states, and so can tell what others' prompts begin with.
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
    # Hosts that a browser may have been told to reach it by; None: any.
    hosts: frozenset[str] | None = None
    # Pages of these may use it from a browser; *: of any.
    origins: tuple[str, ...] = ()
    started: int = field(default_factory=lambda: int(time.time()))
    seldom: Seldom = field(default_factory=Seldom)
    # Whether a request came since this was set back whose memory may go back.
    had_long: bool = False
    _received: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._short, self._long = Lane("short texts"), Lane("long texts")

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
        places = self.scheduler.own_places
        if count > places:
            raise ApiError(
                400,
                f"the request asks for {count:,} answers, and this server has places for "
                f"{places:,}: ask for fewer",
            )

    @contextmanager
    def receiving(self, client: str) -> Iterator[Callable[[int], None]]:
        """What is told of bytes of a body that came; ApiError 429 when clients send too much."""
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
        """What ``work`` gives, which takes as long as the request's ``size`` in characters.

        In a thread of its own, one request of a client at a time. None where the client left.
        """
        lane = self._short if size <= LONG else self._long
        try:
            return await lane.turn(client, is_gone, work)
        finally:
            self.had_long |= size > LONG

    def owner(self, asked: ChatRequest | CompletionRequest, client: str) -> str:
        """For whom the states that a request leaves are kept."""
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
        """Refuse a text of too many tokens when so many of it were found, and read no more."""
        if len(text) <= max(_SLICE, self.limits.prompt_tokens):
            return
        count = 0
        for start in range(0, len(text), _SLICE):
            found = len(self.engine.encode(text[start : start + _SLICE]))
            count += max(0, found - _CUT)
            self._check_count(count, "more than ")


class Lane:
    """A thread for work that takes long, in which clients take turns."""

    def __init__(self, name: str) -> None:
        self._thread = ThreadPoolExecutor(1, name)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def turn(
        self, client: str, is_gone: Callable[[], Awaitable[bool]], work: Callable[[], T]
    ) -> T | None:
        """What ``work`` gives when it is the client's turn; None where the client left."""
        lock = self._turns.get(client) or self._turns.setdefault(client, asyncio.Lock())
        async with lock:
            if await is_gone():
                return None
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)


class Exchange:
    """A request's jobs and what happens to them; leaving it cancels what still runs."""

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


def failure(error: BaseException) -> ApiError:
    """What a client is told of an error: all of it only when it is one of its own making."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Busy):
        return ApiError(429, str(error), kind="rate_limit_error", code="rate_limit_exceeded")
    if isinstance(error, Stopping):
        return ApiError(503, str(error), kind="server_error")
    if isinstance(error, SupraError):
        return ApiError(400, str(error))
    return ApiError(500, "the server failed at this request: see its log", kind="server_error")
