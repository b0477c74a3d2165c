"""What clients send and get, as OpenAI's interface has it.

https://platform.openai.com/docs/api-reference/chat and .../completions. Fields that would change
the answer and are not supported are refused; those that would not are let pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from supra_core.conversation import Message
from supra_core.errors import SupraError
from supra_core.generate import Sampling

# An answer's tokens when the client names no number.
USUAL_TOKENS = 512
# Strings that end an answer, and characters of one: all are looked for at every token.
_MOST_STOPS, _LONGEST_STOP = 16, 1000
# What would change the answer, OpenAI's and others', with the values that would not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "logprobs": (False,), "top_logprobs": (0,),
    "logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,), "suffix": ("",),
    "echo": (False,), "audio": (), "prediction": (), "best_of": (1,), "top_k": (0, -1),
    "min_tokens": (0,), "ignore_eos": (False,), "web_search_options": (),
}  # fmt: skip


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

    @field_validator("content", mode="before")
    @classmethod
    def _is_text(cls, content: Any) -> Any:
        parts = content if isinstance(content, list) else []
        if isinstance(content, str) or (parts and all(_is_text_part(part) for part in parts)):
            return content
        raise ValueError("must be text, or parts of type text, of which there is at least one")

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
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: Annotated[int, Field(ge=1, le=8)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _are_few(cls, stop: str | list[str] | None) -> str | list[str] | None:
        texts = stop if isinstance(stop, list) else [stop or ""]
        if len(texts) > _MOST_STOPS or any(len(text) > _LONGEST_STOP for text in texts):
            raise ValueError(
                f"may be {_MOST_STOPS} texts of {_LONGEST_STOP:,} characters: give fewer or "
                "shorter ones"
            )
        return stop

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        # What is null is not there.
        data = {name: value for name, value in data.items() if value is not None}
        for name in _UNSUPPORTED.keys() & data.keys():
            if not any(_is_same(data[name], neutral) for neutral in _UNSUPPORTED[name]):
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
        """The server's own where the request names none; ApiError when out of range."""
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
        try:
            return replace(usual, **given, max_tokens=tokens or min(USUAL_TOKENS, most_tokens))
        except SupraError as error:
            # It begins with the setting that is out of range.
            raise ApiError(400, str(error), param=str(error).partition(" ")[0]) from None

    @property
    def tokens_asked(self) -> int | None:
        """The most that the answer may have, by the newer name or the older."""
        return self.max_completion_tokens or self.max_tokens


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]


class CompletionRequest(_Request):
    """``POST /v1/completions``: texts, or token ids, to go on from."""

    prompt: str | list[str] | list[int] | list[list[int]]

    @field_validator("prompt", mode="before")
    @classmethod
    def _is_prompt(cls, prompt: Any) -> Any:
        # In words of its own: those of a union are its first member's.
        parts = prompt if isinstance(prompt, list) else []
        several = [part for part in parts if isinstance(part, list) and part]
        lists_of_ids = len(several) == len(parts) and all(_all_of(ids, int) for ids in several)
        if isinstance(prompt, str) or (
            parts and (_all_of(parts, str) or _all_of(parts, int) or lists_of_ids)
        ):
            return prompt
        raise ValueError("must be a text, texts, token ids, or lists of token ids, and not empty")

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[int(token) for token in self.prompt]]  # type: ignore[arg-type]
        return list(self.prompt)  # type: ignore[arg-type]


def _all_of(values: list[Any], kind: type) -> bool:
    return all(type(value) is kind for value in values)


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") == "text" and type(part.get("text")) is str


def _is_same(value: Any, other: Any) -> bool:
    """As JSON has it: there, true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


R = TypeVar("R", bound=_Request)


def parsed(kind: type[R], body: bytes) -> R:
    """The request in ``body``; :class:`ApiError` 400 that names the field when it is none."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"] if not _is_type(part))
        where = f"{field}: " if field else ""
        problem = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"{where}{problem}", param=field or None) from None


def _is_type(part: int | str) -> bool:
    """Whether pydantic put it there to tell the members of a union apart."""
    return isinstance(part, str) and (part in {"str", "int"} or "[" in part)
