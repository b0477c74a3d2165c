"""Requests and errors of OpenAI's interface, validated.

https://platform.openai.com/docs/api-reference/chat and .../completions. supra_cli.serving.fields
says what is done with each field.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from supra_cli.serving.fields import ALIASES, DONE, VARIABLES, Route, problem
from supra_core.errors import SupraError
from supra_core.formats.jsonfile import parse
from supra_core.runtime.engine import Message
from supra_core.runtime.sampling import Sampling
from supra_core.text import Rendering

# max_tokens of requests that have none.
USUAL_TOKENS = 512
# Stop strings, and characters of one: all are searched at every token.
_MOST_STOPS, _LONGEST_STOP = 16, 1000
# Limits of top log-probabilities: OpenAI's.
_MOST_TOP = {"chat": 20, "completions": 5}


class ApiError(Exception):
    """An error for the client: HTTP status, message, and OpenAI's fields."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.kind = status, param, code, kind

    def body(self) -> dict[str, Any]:
        """As OpenAI writes errors."""
        about = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": about}


class _Strict(BaseModel):
    # JSON has its own types: "12" is not a number.
    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _given(cls, data: Any) -> Any:
        """null counts as absent."""
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if value is not None}


class TextPart(_Strict):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: str


class Function(_Strict):
    """A called function; ``arguments``: a JSON object, possibly as text."""

    name: str
    arguments: str | dict[str, Any] = "{}"

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, arguments: str | dict[str, Any]) -> dict[str, Any]:
        value = arguments
        if isinstance(arguments, str):
            try:
                value = parse(arguments)
            except ValueError:
                value = arguments
        if not isinstance(value, dict):
            raise ValueError("must be a JSON object")
        return value


class ToolCall(_Strict):
    """A tool call in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: Function
    # Its index in a stream.
    index: int | None = None


class ChatMessage(_Strict):
    """One message; ``developer`` is the newer name of ``system``.

    ``content`` may be absent only next to ``tool_calls``. ``annotations``: links in OpenAI's
    answers.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    annotations: list[Any] | None = None
    content: Annotated[str | list[TextPart] | None, Field(validate_default=True)] = None

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, content: Any, info: ValidationInfo) -> Any:
        parts = content if isinstance(content, list) else []
        if isinstance(content, str) or (parts and all(_is_text_part(part) for part in parts)):
            return content
        if content is None and info.data.get("tool_calls"):
            return content
        raise ValueError("must be text, or a non-empty list of parts of type text")

    @property
    def uses_tools(self) -> bool:
        """Whether it is a tool call or a tool's result."""
        return self.role == "tool" or bool(self.tool_calls)

    def plain(self) -> Message:
        """The message as chat templates expect it."""
        told = self.model_dump(exclude_none=True, exclude={"annotations"})
        told["role"] = "system" if self.role == "developer" else self.role
        if not isinstance(self.content, str | None):
            told["content"] = "\n".join(part.text for part in self.content)
        # Templates may read it in any message.
        told.setdefault("content", None)
        return told


class StreamOptions(_Strict):
    """``include_usage``: token counts follow in a last chunk.

    ``include_obfuscation`` (padding of the stream) is accepted and has no effect.
    """

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: Literal[False] = False


class _Request(_Strict):
    route: ClassVar[Route]
    model: str | None = None
    # -1: the server's limit.
    max_tokens: Annotated[int, Field(ge=-1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=-1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    n: Annotated[int, Field(ge=1, le=8)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    cache_salt: str | None = None

    @field_validator("stop")
    @classmethod
    def _are_few(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = stop if isinstance(stop, list) else [stop or ""]
        if len(texts) > _MOST_STOPS or any(len(text) > _LONGEST_STOP for text in texts):
            raise ValueError(
                f"may have {_MOST_STOPS} texts of {_LONGEST_STOP:,} characters: use fewer or "
                "shorter ones"
            )
        return stop

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        done: dict[str, Any] = {}
        for name, value in data.items():
            if value is None:
                continue
            if wrong := problem(cls.route, name, value):
                raise ApiError(400, wrong, param=name)
            if name not in DONE[cls.route]:
                continue
            own = str(ALIASES.get(name, name))
            if done.setdefault(own, value) != value:
                raise ApiError(
                    400, f"{name} and another name of {own} contradict each other: give one",
                    param=name,
                )  # fmt: skip
        return done

    def owner(self, client: str) -> str:
        """The owner of the states that the request leaves."""
        return json.dumps([client, self.user, self.prompt_cache_key, self.cache_salt])

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)

    @property
    def top(self) -> int | None:
        """Number of top log-probabilities; None: no log-probabilities."""
        raise NotImplementedError

    @property
    def silent(self) -> bool:
        """Whether the prompt is only processed, without an answer."""
        return self._tokens == 0

    def sampling(self, usual: Sampling, most_tokens: int) -> Sampling:
        """The request's settings over the server's; ApiError for values out of range."""
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        named = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in named.items() if value is not None}
        if self.seed is not None and self.seed != -1:
            given["seed"] = self.seed % 2**32
        tokens = USUAL_TOKENS if self._tokens is None else self._tokens
        tokens = most_tokens if tokens == -1 else min(tokens, most_tokens)
        try:
            return replace(usual, **given, max_tokens=max(tokens, 1))
        except SupraError as error:
            # The message begins with the name of the setting.
            raise ApiError(400, str(error), param=str(error).partition(" ")[0]) from None

    @property
    def _tokens(self) -> int | None:
        """The limit of the answer, by its newer or older name."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    route: ClassVar[Route] = "chat"
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP["chat"])] = 0
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @field_validator("max_tokens", "max_completion_tokens")
    @classmethod
    def _says_something(cls, tokens: int | None) -> int | None:
        if tokens == 0:
            raise ValueError("must be at least 1, or -1 for the server's limit")
        return tokens

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_variables(cls, variables: dict[str, Any]) -> dict[str, Any]:
        if taken := VARIABLES & variables.keys():
            raise ValueError(f"{min(taken)} is set by the server or another field: omit it")
        return variables

    @property
    def top(self) -> int | None:
        """``top_logprobs``, which needs ``logprobs``."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return self.top_logprobs if self.logprobs else None

    def rendering(self) -> Rendering:
        """How the template renders the messages; ApiError for contradicting fields.

        A last message of the assistant is continued, unless the request asks for a new answer.
        """
        last, header = self.messages[-1], self.add_generation_prompt
        continues = self.continue_final_message
        if continues and header:
            raise ApiError(
                400, "add_generation_prompt and continue_final_message contradict each other: use "
                "one of them", param="continue_final_message",
            )  # fmt: skip
        if continues and last.role != "assistant":
            raise ApiError(
                400, "continue_final_message needs a last message of the assistant: add one, or "
                "omit the field", param="continue_final_message",
            )  # fmt: skip
        if continues is None:
            continues = last.role == "assistant" and not header
        if continues and last.tool_calls:
            raise ApiError(
                400, "the messages end with tool calls: add the tools' results",
                param="messages",
            )  # fmt: skip
        return Rendering(
            answer_next=header is not False,
            continues=continues,
            variables=self.chat_template_kwargs,
        )


class CompletionRequest(_Request):
    """``POST /v1/completions``: texts or token ids to continue."""

    route: ClassVar[Route] = "completions"
    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=_MOST_TOP["completions"])] | None = None
    echo: bool = False

    @field_validator("logprobs", mode="before")
    @classmethod
    def _number(cls, count: Any) -> Any:
        # false, as in chat completions, means none.
        return None if count is False else count

    @field_validator("prompt", mode="before")
    @classmethod
    def _is_prompt(cls, prompt: Any) -> Any:
        # Checked here, because pydantic reports only the first member of a union.
        parts = prompt if isinstance(prompt, list) else []
        several = [part for part in parts if isinstance(part, list) and part]
        lists_of_ids = len(several) == len(parts) and all(_all_of(ids, int) for ids in several)
        if isinstance(prompt, str) or (
            parts and (_all_of(parts, str) or _all_of(parts, int) or lists_of_ids)
        ):
            return prompt
        raise ValueError(
            "must be a text, a list of texts, token ids, or a list of token ids, and not empty"
        )

    @property
    def top(self) -> int | None:
        """The number in ``logprobs``."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """All prompts of the request."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[int(token) for token in self.prompt]]  # type: ignore[arg-type]
        return list(self.prompt)  # type: ignore[arg-type]


def _all_of(values: list[Any], kind: type) -> bool:
    return all(type(value) is kind for value in values)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and type(part.get("text")) is str


R = TypeVar("R", bound=_Request)


def parsed(kind: type[R], body: bytes) -> R:
    """The request in ``body``; :class:`ApiError` 400, with the field, if it is invalid."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        # The error deepest inside: of the union's member that fits best.
        first = max(problems, key=lambda found: len(found["loc"]))
        field = ".".join(str(part) for part in first["loc"] if not _is_type(part))
        where = f"{field}: " if field else ""
        problem = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            problem = "is unknown: omit it"
        raise ApiError(400, f"{where}{problem}", param=field or None) from None


def _is_type(part: int | str) -> bool:
    """Whether pydantic added it to name a member of a union."""
    return isinstance(part, str) and (part in {"str", "int", "TextPart"} or "[" in part)
