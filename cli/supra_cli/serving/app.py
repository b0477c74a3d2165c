"""The HTTP routes of OpenAI's interface, on Starlette."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from supra_cli.serving.answers import Answers
from supra_cli.serving.logprobs import Echo
from supra_cli.serving.quiet import Seldom
from supra_cli.serving.schema import ApiError, ChatRequest, CompletionRequest, R, parsed
from supra_cli.serving.service import Exchange, Listener, Service, failure
from supra_cli.shared.output import log
from supra_core.runtime.sampling import Sampling
from supra_core.runtime.scheduler import Failed, Job, Places, PromptLikelihoods, Reading

Endpoint = Callable[[Request], Awaitable[Response]]
T = TypeVar("T")


def build(service: Service) -> Starlette:
    """The application of a running service."""
    routes = Routes(service)
    return Starlette(
        routes=[
            Route("/health", routes.health),
            Route("/v1/models", routes.guarded(routes.models)),
            Route("/v1/models/{name:path}", routes.guarded(routes.model)),
            Route("/v1/chat/completions", routes.guarded(routes.chat), methods=["POST"]),
            Route("/v1/completions", routes.guarded(routes.complete), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _no_route},
        # The outermost layer, so that web pages can read errors as well.
        middleware=[*_pages(service.origins), Middleware(_Door, service.hosts)],
    )


class _Door:
    """Refuses requests by their headers, before anything is read."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self._app, self._hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if wrong := self._refused(Headers(scope=scope)):
            # The body is not read: its length may be ambiguous.
            await _error(wrong, {"Connection": "close"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refused(self, headers: Headers) -> ApiError | None:
        if "content-length" in headers and "transfer-encoding" in headers:
            return ApiError(400, "Content-Length and Transfer-Encoding contradict each other")
        host = _host(headers)
        if self._hosts is not None and host not in self._hosts:
            # DNS rebinding: a foreign page may let its own name point here.
            return ApiError(403, f"this server does not answer for {host}")
        return None


def _pages(origins: Sequence[str]) -> list[Middleware]:
    """Middleware that lets web pages of ``origins`` use the service."""
    if not origins:
        return []
    # Keys are headers that pages set themselves; cookies are never used.
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        allow_private_network=True,
    )
    return [cors]


class Routes:
    """The endpoints of a service."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def guarded(self, endpoint: Endpoint) -> Endpoint:
        """The endpoint with authentication, and with errors in OpenAI's form."""

        async def answer(request: Request) -> Response:
            seldom = self.service.seldom
            try:
                request.state.client = self._client(request)
                return await endpoint(request)
            except ClientDisconnect:
                seldom.log("left", "a client disconnected before its answer")
                return Response(status_code=499)
            except (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit):
                raise
            # A panic of native code is not an Exception.
            except BaseException as error:
                told = _told(error, seldom)
                line = f"{request.method} {request.url.path}: {told.status}, {told}"
                seldom.log(f"refused {told.status}", line)
                return _error(told)

        return answer

    async def health(self, request: Request) -> Response:
        """Whether the model runs, and how many requests it has; 503 when it has ended."""
        scheduler = self.service.scheduler
        if broken := scheduler.broken:
            return _error(failure(broken))
        return JSONResponse({"status": "ok", "requests": scheduler.taken})

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        listed = [self._model(name) for name in self.service.models]
        return JSONResponse({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/NAME``."""
        name = request.path_params["name"]
        self.service.context(name)
        return JSONResponse(self._model(name))

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``."""
        asked = await self._asked(ChatRequest, request)
        context = self.service.context(asked.model)
        self.service.check_answers(asked.n)
        system = any(message.role in ("system", "developer") for message in asked.messages)
        if context.messages and system:
            raise ApiError(
                400, "a context has its own system message: omit yours", param="messages"
            )
        how = asked.rendering()
        answers = self._answers(asked, 1)
        with self.service.scheduler.take(request.state.client, answers.count) as places:
            read = partial(self.service.rendered, context, asked.messages, how)
            prompts = [await self._in_turn(request, read)]
            return await self._answered(request, asked, prompts, answers, places, how.continues)

    async def complete(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        asked = await self._asked(CompletionRequest, request)
        if self.service.context(asked.model).messages:
            raise ApiError(
                400, "a context is for chat completions: use the model's own name", param="model"
            )
        self.service.check_answers(len(asked.prompts) * asked.n)
        answers = self._answers(asked, len(asked.prompts))
        with self.service.scheduler.take(request.state.client, answers.count) as places:
            prompts = []
            for prompt in asked.prompts:
                read = partial(self.service.encoded, prompt)
                prompts.append(await self._in_turn(request, read))
                if asked.echo:
                    echo = partial(self._echo, prompt, prompts[-1])
                    answers.echoes.append(await self._in_turn(request, echo))
            return await self._answered(request, asked, prompts, answers, places, True)

    async def _in_turn(self, request: Request, work: Callable[[], T]) -> T:
        """Work whose duration grows with the size of the request."""
        client, size = request.state.client, request.state.size
        done = await self.service.in_turn(client, size, request.is_disconnected, work)
        if done is None:
            raise ClientDisconnect
        return done

    def _echo(self, prompt: str | list[int], ids: list[int]) -> Echo:
        return Echo(prompt if isinstance(prompt, str) else None, ids, self.service.engine.decode)

    def _answers(self, asked: ChatRequest | CompletionRequest, prompts: int) -> Answers:
        chat, name = isinstance(asked, ChatRequest), asked.model or self.service.name
        return Answers(chat, name, prompts, asked.n, asked.top, self.service.engine.decode)

    async def _answered(
        self,
        request: Request,
        asked: ChatRequest | CompletionRequest,
        prompts: Sequence[list[int]],
        answers: Answers,
        places: Places,
        continues: bool,
    ) -> Response:
        sampling = asked.sampling(self.service.usual, self.service.limits.answer_tokens)
        client = request.state.client
        owner = self.service.owner(asked, client)

        def of_its_own(index: int) -> Sampling:
            # Answers to one prompt differ from each other, but not from run to run.
            seed = sampling.seed
            return sampling if seed is None else replace(sampling, seed=(seed + index) % 2**32)

        def job(index: int, deliver: Listener) -> Job:
            return Job(
                prompts[index // asked.n],
                of_its_own(index),
                asked.stops,
                deliver,
                continues=continues,
                ends=frozenset(asked.stop_token_ids or ()),
                top=asked.top,
                # Once a prompt.
                score_prompt=bool(answers.echoes)
                and asked.top is not None
                and index % asked.n == 0,
                silent=asked.silent,
                client=client,
                owner=owner,
            )

        exchange = Exchange(places, [partial(job, index) for index in range(answers.count)])
        if not asked.stream:
            await _until_gone(request, exchange, answers)
            # Log-probabilities of a long prompt are many numbers.
            return await run_in_threadpool(lambda: JSONResponse(answers.whole()))
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return _Streamed(exchange, _stream(exchange, answers, usage, self.service.seldom))

    def _client(self, request: Request) -> str:
        """The client: its key, else its address; ApiError 401 for a wrong or missing key."""
        keys = self.service.keys
        if not keys:
            return request.client.host if request.client else ""
        # Headers are bytes, and so may a key be.
        header = request.headers.get("authorization", "").encode("latin-1")
        scheme, _, given = header.partition(b" ")
        # All are compared, so that the time reveals nothing.
        same = [secrets.compare_digest(given.strip(), os.fsencode(key)) for key in keys]
        if scheme.lower() != b"bearer" or not any(same):
            raise ApiError(401, "the API key is wrong or missing", code="invalid_api_key")
        return f"key {same.index(True)}"

    async def _asked(self, kind: type[R], request: Request) -> R:
        """The validated request in the body."""
        with self.service.receiving(request.state.client) as received:
            body = await self._body(request, received)
            request.state.size = len(body)
            return await self._in_turn(request, partial(parsed, kind, body))

    async def _body(self, request: Request, received: Callable[[int], None]) -> bytes:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            # Web pages of other origins can send only other types without permission.
            raise ApiError(415, "send JSON with the header Content-Type: application/json")
        most = self.service.limits.body_bytes
        body = bytearray()
        async for part in request.stream():
            body += part
            received(len(part))
            if len(body) > most:
                raise ApiError(413, f"the request exceeds {most:,} bytes: shorten it")
        return bytes(body)

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.service.started, "owned_by": "supra"}


class _Streamed(StreamingResponse):
    """An exchange as server-sent events; it ends with the response, even before its first event."""

    def __init__(self, exchange: Exchange, events: AsyncIterator[str]) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the response."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.cancel()


def _host(headers: Headers) -> str | None:
    """The host in the request, without the port."""
    try:
        return urlsplit("//" + headers.get("host", "")).hostname
    except ValueError:
        return None


async def _stream(
    exchange: Exchange, answers: Answers, usage: bool, seldom: Seldom
) -> AsyncIterator[str]:
    """Server-sent events: chunks as JSON, progress as comments, which keep a connection alive."""
    for chunk in answers.opening():
        yield _event(chunk)
    async with aclosing(exchange.events()) as events:
        async for index, event in events:
            if isinstance(event, Reading):
                yield f": {event.done} of {event.total} tokens read\n\n"
            elif isinstance(event, Failed):
                yield _event(_told(event.error, seldom).body())
                return
            else:
                answers.hear(index, event)
                chunks = partial(answers.chunks, index, event)
                # A prompt may have many tokens.
                followed = isinstance(event, PromptLikelihoods)
                for chunk in await run_in_threadpool(chunks) if followed else chunks():
                    yield _event(chunk)
    if usage:
        yield _event(answers.usage_chunk())
    yield "data: [DONE]\n\n"
    _log(answers)


async def _until_gone(request: Request, exchange: Exchange, answers: Answers) -> None:
    """Collect every answer, or stop when the client disconnects."""
    collecting = asyncio.create_task(_collect(exchange, answers))
    leaving = asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise ClientDisconnect
        collecting.result()
    finally:
        collecting.cancel()
        leaving.cancel()
        exchange.cancel()
    _log(answers)


async def _collect(exchange: Exchange, answers: Answers) -> None:
    async with aclosing(exchange.events()) as events:
        async for index, event in events:
            if isinstance(event, Failed):
                raise event.error
            if not isinstance(event, Reading):
                answers.hear(index, event)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


def _error(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    usual = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}
    return JSONResponse(error.body(), error.status, headers or usual.get(error.status))


def _told(error: BaseException, seldom: Seldom) -> ApiError:
    """The error for the client; an internal one goes to the log with its traceback."""
    told = failure(error)
    if told.status == 500:
        seldom.failure(error)
    return told


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    # Those of 405 state the allowed methods.
    return _error(ApiError(error.status_code, message), error.headers)


def _log(answers: Answers) -> None:
    usage = answers.usage()
    spoken = max((end.decode_seconds for end in answers.ends.values()), default=0.0)
    read = max((end.prefill_seconds for end in answers.ends.values()), default=0.0)
    known = usage["prompt_tokens_details"]["cached_tokens"]
    log(
        f"{answers.model}: prompt {usage['prompt_tokens']:,} tokens, {known:,} of them cached, "
        f"in {read:.1f} s; answer {usage['completion_tokens']:,} in {spoken:.1f} s"
    )
