"""A chat template as strings: what opens and what closes each side's turns.

The template is a jinja program that only knows how to render whole conversations. Rendered with
marks in place of the messages, it shows what it puts between them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from supra_core.errors import FormatError
from supra_core.formats.jsonfile import parse

if TYPE_CHECKING:
    from jinja2 import Environment

Messages = Sequence[Mapping[str, str]]

# No template changes these: no white space at the ends, no case to fold, nothing to escape.
_MARKS = ("Xq7userA", "Xq7answerA", "Xq7userB")
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

# What templates ask for the time, as transformers has it.
_CLOCK = "strftime_now"
# The time for templates that must have one, whenever they are rendered: 1 January 2025, noon.
FIXED_TIME = datetime(2025, 1, 1, 12)
_CLOCK_CALL = re.compile(rf"""\b{_CLOCK}\(\s*(?:format\s*=\s*)?(["'])((?:(?!\1)[^\\\n])*)\1\s*\)""")


@dataclass(frozen=True)
class ChatTurns:
    """What stands around the messages of a conversation, verbatim.

    ``opening`` USER ``to_answer`` ANSWER ``to_user`` USER ... ANSWER ``closing``; the opening
    includes the system prompt that the template has by default.
    """

    opening: str
    to_answer: str
    to_user: str
    closing: str


def read_template(assets: Mapping[str, bytes], where: str) -> str | None:
    """The chat template among a source's assets, None if there is none; ``where`` is for errors.

    As transformers keeps it: a file of its own, or a field of tokenizer_config.json, which may
    hold several by name.
    """
    if "chat_template.jinja" in assets:
        return assets["chat_template.jinja"].decode("utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _object(assets, name, where).get("chat_template")
        if isinstance(found, list):
            named = {str(entry.get("name")): entry.get("template") for entry in found}
            found = named.get("default")
        if isinstance(found, str) and found:
            return found
    return None


def named_tokens(assets: Mapping[str, bytes], where: str) -> dict[str, str]:
    """``bos_token``, ``eos_token``, ... as the tokenizer's config spells them."""
    config = _object(assets, "tokenizer_config.json", where)
    named = {}
    for name in _NAMED_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            named[name] = token
    return named


def render(
    template: str, messages: Messages, *, answer_next: bool, tokens: Mapping[str, str]
) -> str:
    """The conversation by the template; ``answer_next`` adds the answer's header.

    The clock is not offered to the template, and one that cannot do without is told FIXED_TIME:
    the same messages give the same text on every day. Raises FormatError when the template is
    broken or refuses the messages.
    """
    from jinja2 import TemplateError, UndefinedError

    def rendered(**more: Any) -> str:
        return _environment().from_string(template).render(
            messages=list(messages), add_generation_prompt=answer_next, **tokens, **more
        )  # fmt: skip

    try:
        try:
            return rendered()
        except UndefinedError as error:
            if error.message != f"'{_CLOCK}' is undefined":
                raise
            return rendered(**{_CLOCK: FIXED_TIME.strftime})
    # A template is a program: whatever it raises is its own fault.
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise FormatError(
            f"the model's chat template cannot be rendered ({error}): correct chat_template.jinja"
        ) from None


def with_time(template: str, now: datetime) -> str:
    """The template with ``now`` written where it asks for the time, by a format that it spells.

    transformers' own clock cannot be set: of variables only plain values reach a template.
    """

    def written(call: re.Match[str]) -> str:
        quote, form = call.groups()
        time = now.strftime(form)
        return call[0] if quote in time or "\\" in time else f"{quote}{time}{quote}"

    return _CLOCK_CALL.sub(written, template)


def split_template(template: str, tokens: Mapping[str, str]) -> ChatTurns:
    """The template's strings around messages; FormatError if it rewrites or reorders them."""
    user, answer, second = _MARKS
    talk = [_message("user", user), _message("assistant", answer), _message("user", second)]
    asked = render(template, talk[:1], answer_next=True, tokens=tokens)
    answered = render(template, talk[:2], answer_next=False, tokens=tokens)
    again = render(template, talk, answer_next=True, tokens=tokens)
    opening, to_answer = _around(asked, user)
    _, closing = _around(answered, answer)
    _, after = _around(again, answer)
    to_user, _ = _around(after, second)
    if not to_answer.strip() or not to_user.strip():
        raise FormatError(
            "the model's chat template puts nothing between a message and the next, so that none "
            "is seen to end: correct chat_template.jinja"
        )
    return ChatTurns(opening, to_answer, to_user, closing)


def _around(text: str, mark: str) -> tuple[str, str]:
    """What stands before and after the only ``mark``."""
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise FormatError(
            "the model's chat template does not show each message once as it is: correct "
            "chat_template.jinja"
        )
    return before, after


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _object(assets: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    try:
        value = parse(assets.get(name, b"{}"))
    except ValueError as error:
        raise FormatError(f"{where}: {name} is not valid JSON ({error}): get it again") from None
    return value if isinstance(value, dict) else {}


def _environment() -> Environment:
    """Set up as transformers does, in a sandbox: a template comes with a model from anywhere."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what to train on; here its body is all that counts."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment
