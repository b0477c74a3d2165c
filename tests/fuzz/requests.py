"""Bodies that clients send to a server: a request, or an error with the field in it."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from supra_cli.serving.schema import ApiError, ChatRequest, CompletionRequest, parsed
from supra_core.errors import SupraError
from supra_core.runtime.sampling import Sampling
from tests.fuzz.harness import Files, Format
from tests.fuzz.mutations import Seeded, changed_bytes, changed_value

_USUAL: dict[str, Any] = {
    "model": "m", "max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "seed": 3,
    "repetition_penalty": 1.5, "stop": ["a", "b"], "n": 2, "stream": True,
    "stream_options": {"include_usage": True},
}  # fmt: skip
_CHAT: dict[str, Any] = {
    **_USUAL,
    "messages": [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "content": "yes", "name": "a"},
    ],
    "response_format": {"type": "text"},
    "max_completion_tokens": 4,
}
_PROMPTS = ("a text", ["a", "b"], [1, 2], [[1, 2], [3]])
_MORE: tuple[tuple[str, Any], ...] = (
    ("tools", []), ("tools", [{"type": "function"}]), ("functions", []), ("logprobs", False),
    ("logprobs", 1), ("top_logprobs", 0), ("logit_bias", {}), ("logit_bias", {"1": 100}),
    ("frequency_penalty", 0.0), ("presence_penalty", True), ("suffix", ""), ("echo", True),
    ("best_of", 1), ("top_k", -1), ("min_tokens", 0), ("response_format", {"type": "json_object"}),
    ("response_format", []), ("stop", ["x"] * 17), ("stop", "y" * 1001), ("user", {"a": [1]}),
    ("n", 9), ("seed", -1), ("seed", 10**30), ("max_tokens", 10**9), ("temperature", 1e-320),
)  # fmt: skip


def _drawn(random: Random) -> tuple[Files, str]:
    chance = Seeded(random)
    is_chat = chance.number(0, 1)
    body = dict(_CHAT) if is_chat else {**_USUAL, "prompt": chance.one(_PROMPTS)}
    for _ in range(chance.number(0, 8)):
        del body[chance.one(sorted(body))]
    for _ in range(chance.number(0, 1)):
        name, value = chance.one(_MORE)
        body[name] = value
    kind = chance.number(0, 9)
    # Two of ten stay as they are.
    content = json.dumps(changed_value(chance, body) if kind < 6 else body).encode()
    if kind in (0, 6):
        content = changed_bytes(chance, content)
    elif kind == 7:
        content = chance.binary(100)
    return {"chat" if is_chat else "completion": content}, "chat" if is_chat else "completion"


def _read(path: Path) -> object:
    """As the server takes a request before it is computed."""
    try:
        content = path.read_bytes()
        if path.name == "chat":
            chat = parsed(ChatRequest, content)
            found: list[Any] = [chat.sampling(Sampling(), 512), [m.plain() for m in chat.messages]]
            asked: ChatRequest | CompletionRequest = chat
        else:
            asked = completion = parsed(CompletionRequest, content)
            found = [completion.sampling(Sampling(), 512), completion.prompts]
        assert all(asked.stops) and 0 < found[0].max_tokens <= 512
        return found
    except ApiError as error:
        # As it goes over the line: no half of a pair of surrogates, no NaN.
        json.dumps(error.body(), ensure_ascii=False, allow_nan=False).encode()
        raise SupraError(str(error)) from error


FORMATS = (Format.seeded("request", _drawn, _read),)
