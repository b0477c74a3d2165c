"""The routes of OpenAI's interface on Starlette."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from supra_cli.output import log, log_failure
from supra_cli.serving.answers import Answers
from supra_cli.serving.logprobs import Echo
from supra_cli.serving.schema import ApiError, ChatRequest, CompletionRequest, parsed
from supra_cli.serving.service import Exchange, Listener, Service, failure
from supra_core.generate import Sampling
from supra_core.scheduler import Failed, Followed, Job, Reading

Endpoint = Callable[[Request], Awaitable[Response]]


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
        middleware=_middleware(service.origins),
    )


def _middleware(origins: Sequence[str]) -> list[Middleware]:
    """What lets pages of ``origins`` use the service from a browser."""
    if not origins:
        return []
    # A key is a header that pages set themselves: no cookie is ever of use.
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
        """The endpoint for those who may use it, its errors as OpenAI writes them."""

        async def answer(request: Request) -> Response:
            try:
                self._check(request)
                return await endpoint(request)
            except ClientDisconnect:
                log("a client left before its answer")
                return Response(status_code=499)
            except Exception as error:
                told = _told(error)
                log(f"{request.method} {request.url.path}: {told.status}, {told}")
                return _error(told)

        return answer

    async def health(self, request: Request) -> Response:
        """That the model is loaded, and how many requests it has."""
        return JSONResponse({"status": "ok", "requests": self.service.scheduler.taken})

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
        asked = parsed(ChatRequest, await self._body(request))
        context = self.service.context(asked.model)
        self.service.check_answers(asked.n)
        system = any(message.role in ("system", "developer") for message in asked.messages)
        if context.messages and system:
            raise ApiError(
                400, "a context has its own system message: leave out yours", param="messages"
            )
        how = asked.rendering()
        ids = await run_in_threadpool(self.service.rendered, context, asked.messages, how)
        answers = self._answers(asked, 1)
        return await self._answered(request, asked, [ids], answers, continues=how.continues)

    async def complete(self, request: Request) -> Response:
        """``POST /v1/completions``."""
        asked = parsed(CompletionRequest, await self._body(request))
        if self.service.context(asked.model).messages:
            raise ApiError(400, "a context is for chat completions: name the model", param="model")
        self.service.check_answers(len(asked.prompts) * asked.n)
        prompts = [await run_in_threadpool(self.service.encoded, p) for p in asked.prompts]
        answers = self._answers(asked, len(prompts))
        if asked.echo:
            answers.echoes = [
                await run_in_threadpool(self._echo, prompt, ids)
                for prompt, ids in zip(asked.prompts, prompts, strict=True)
            ]
        return await self._answered(request, asked, prompts, answers, continues=True)

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
        *,
        continues: bool,
    ) -> Response:
        sampling = asked.sampling(self.service.usual, self.service.limits.answer_tokens)

        def of_its_own(index: int) -> Sampling:
            # Answers to one prompt differ, and are the same the next time.
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
                # Once for all answers to a prompt.
                followed=bool(answers.echoes) and asked.top is not None and index % asked.n == 0,
                silent=asked.silent,
            )

        exchange = Exchange(self.service, [partial(job, index) for index in range(answers.count)])
        if not asked.stream:
            await _until_gone(request, exchange, answers)
            # Log-probabilities of a long prompt are many numbers.
            return await run_in_threadpool(lambda: JSONResponse(answers.whole()))
        usage = asked.stream_options is not None and asked.stream_options.include_usage
        return StreamingResponse(
            _stream(exchange, answers, usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
        )

    def _check(self, request: Request) -> None:
        host = _host(request)
        if self.service.hosts is not None and host not in self.service.hosts:
            # A page elsewhere may have its own name point here.
            raise ApiError(403, f"this server does not answer for {host}")
        if self.service.key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if not secrets.compare_digest(given.encode(), self.service.key.encode()):
            raise ApiError(401, "the API key is wrong or missing", code="invalid_api_key")

    async def _body(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            # What a page of another origin may send unasked has other types.
            raise ApiError(415, "send JSON with the header Content-Type: application/json")
        most = self.service.limits.body_bytes
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise ApiError(413, f"the request is longer than {most:,} bytes: shorten it")
        return bytes(body)

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.service.started, "owned_by": "supra"}


def _host(request: Request) -> str | None:
    """What the client calls this server, without the port."""
    try:
        return urlsplit("//" + request.headers.get("host", "")).hostname
    except ValueError:
        return None


async def _stream(exchange: Exchange, answers: Answers, usage: bool) -> AsyncIterator[str]:
    """Server-sent events: chunks as JSON, progress in comments, which keep a connection alive."""
    for chunk in answers.opening():
        yield _event(chunk)
    async with aclosing(exchange.events()) as events:
        async for index, event in events:
            if isinstance(event, Reading):
                yield f": {event.done} of {event.total} tokens read\n\n"
            elif isinstance(event, Failed):
                yield _event(_told(event.error).body())
                return
            else:
                answers.hear(index, event)
                chunks = partial(answers.chunks, index, event)
                # A prompt's tokens may be many.
                followed = isinstance(event, Followed)
                for chunk in await run_in_threadpool(chunks) if followed else chunks():
                    yield _event(chunk)
    if usage:
        yield _event(answers.usage_chunk())
    yield "data: [DONE]\n\n"
    _log(answers)


async def _until_gone(request: Request, exchange: Exchange, answers: Answers) -> None:
    """Hear every answer out, or stop when the client has left."""
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


def _told(error: Exception) -> ApiError:
    """The error for the client; one that is not of its making goes to the log whole."""
    told = failure(error)
    if told.status == 500:
        log_failure(error)
    return told


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    # Those of 405 say what is allowed.
    return _error(ApiError(error.status_code, message), error.headers)


def _log(answers: Answers) -> None:
    usage = answers.usage()
    spoken = max((end.said_seconds for end in answers.ends.values()), default=0.0)
    read = max((end.read_seconds for end in answers.ends.values()), default=0.0)
    known = usage["prompt_tokens_details"]["cached_tokens"]
    log(
        f"{answers.model}: prompt {usage['prompt_tokens']:,} tokens, {known:,} of them known, "
        f"in {read:.1f} s; answer {usage['completion_tokens']:,} in {spoken:.1f} s"
    )
