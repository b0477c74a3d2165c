"""What clients send and get, as OpenAI's interface has it.

https://platform.openai.com/docs/api-reference/chat and .../completions. Fields that would change
the answer and are not supported are refused; those that would not are let pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from supra_core.conversation import Message
from supra_core.generate import Sampling

# An answer's tokens when the client names no number.
USUAL_TOKENS = 512
_UNSUPPORTED = (
    "tools", "functions", "logprobs", "top_logprobs", "logit_bias", "frequency_penalty",
    "presence_penalty", "suffix", "echo", "audio", "prediction",
)  # fmt: skip


class ApiError(Exception):
    """An answer that is an error: HTTP status, message, and OpenAI's names for it."""

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
    # JSON has types of its own: "12" is no number.
    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(_Strict):
    """A part of a message; there is text only."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message; ``developer`` is the newer name of ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def plain(self) -> Message:
        """As a chat template takes it."""
        role = "system" if self.role == "developer" else self.role
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        return {"role": role, "content": content}


class StreamOptions(_Strict):
    """``include_usage``: the numbers of tokens come in a last chunk."""

    include_usage: bool = False


class _Request(_Strict):
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1, le=8)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name in _UNSUPPORTED:
            if data.get(name):
                raise ApiError(400, f"{name} is not supported: leave it out", param=name)
        form = data.get("response_format") or {"type": "text"}
        if not isinstance(form, dict) or form.get("type") != "text":
            raise ApiError(
                400, "response_format is not supported: leave it out", param="response_format"
            )
        return data

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the answer."""
        texts = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in texts if text)

    def sampling(self, usual: Sampling, most_tokens: int) -> Sampling:
        """The server's own where the request names none; SupraError when out of range."""
        names = ("temperature", "top_p", "min_p", "repetition_penalty")
        named = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in named.items() if value is not None}
        tokens = self.tokens_asked
        if tokens is not None and tokens > most_tokens:
            raise ApiError(
                400,
                f"max_tokens {tokens} is more than this server's {most_tokens}",
                param="max_tokens",
            )
        if self.seed is not None:
            given["seed"] = self.seed % 2**32
        return replace(usual, **given, max_tokens=tokens or min(USUAL_TOKENS, most_tokens))

    @property
    def tokens_asked(self) -> int | None:
        """The most that the answer may have."""
        return self.max_tokens


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def tokens_asked(self) -> int | None:
        """By the newer name, or the older."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Request):
    """``POST /v1/completions``: texts, or token ids, to go on from."""

    prompt: str | list[str] | list[int] | list[list[int]]

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[int(token) for token in self.prompt]]  # type: ignore[arg-type]
        return list(self.prompt)  # type: ignore[arg-type]


R = TypeVar("R", bound=_Request)


def parsed(kind: type[R], body: bytes) -> R:
    """The request in ``body``; :class:`ApiError` 400 that names the field when it is none."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"] if not _is_type(part))
        where = f"{field}: " if field else ""
        raise ApiError(400, f"{where}{first['msg']}", param=field or None) from None


def _is_type(part: int | str) -> bool:
    """Whether pydantic put it there to tell the members of a union apart."""
    return isinstance(part, str) and (part in {"str", "int"} or "[" in part)
