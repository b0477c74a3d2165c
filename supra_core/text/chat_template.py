"""A chat template: conversations to text, and the text around each side's turns.

The template is a jinja program that can only render whole conversations. Rendered with marks in
place of the messages, it shows the text between them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from supra_core.errors import FormatError, SupraError, reason

if TYPE_CHECKING:
    from jinja2 import Environment, Template

Messages = Sequence[Mapping[str, Any]]
# From a text of a message and its role to the text that the template gets.
Shown = Callable[[str, str], str]

# No template changes these: no spaces at the ends, nothing to escape.
_MARKS = ("Xq7userA", "Xq7answerA", "Xq7userB")
# Unicode reserves these for programs: no text has them. The second one marks the end of a message
# that is to be continued.
GUARD, _OPEN_END = "\ufdd0", "\ufdd1"
# GUARD as repr and JSON in ASCII write it.
_SPELLED = r"\ufdd0"

# The function that templates call for the time, as in transformers.
_CLOCK = "strftime_now"
# The time for templates that need one where none is given: 1 January 2025, noon.
FIXED_TIME = datetime(2025, 1, 1, 12)


@dataclass(frozen=True)
class Rendering:
    """How a conversation becomes text.

    ``answer_next`` adds the header of the next answer. ``continues``: the text ends with the last
    message, an answer, which is left open. ``variables``: the template's variables besides the
    messages, e.g. ``enable_thinking``.
    """

    answer_next: bool = True
    continues: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)


# For the next answer; and for training: the whole conversation, and nothing after it.
ANSWER, WHOLE = Rendering(), Rendering(answer_next=False)


@dataclass(frozen=True)
class ChatTurns:
    """The text around the messages of a conversation, verbatim.

    ``opening`` USER ``to_answer`` ANSWER ``to_user`` USER ... ANSWER ``closing``; the opening
    includes the system prompt that the template has by default.
    """

    opening: str
    to_answer: str
    to_user: str
    closing: str


@dataclass(frozen=True)
class ChatTemplate:
    """A template's program, and the tokens that it may name, e.g. ``bos_token``."""

    source: str
    tokens: Mapping[str, str]

    def render(
        self,
        messages: Messages,
        how: Rendering = WHOLE,
        now: datetime | None = None,
        shown: Shown | None = None,
    ) -> str:
        """The conversation as text.

        ``now``: the time that the template gets. None: it gets no clock, or FIXED_TIME if it needs
        one, so that the same messages give the same text on every day. ``shown`` changes every text
        of messages and variables before the template gets it.
        Raises FormatError when the template refuses the messages, is broken, or omits the message
        that is to be continued; SupraError when that message is not an answer.
        """
        shown = shown or as_it_is
        messages = [_shown(message, str(message.get("role")), shown) for message in messages]
        how = replace(how, variables=_shown(how.variables, "user", shown))
        if how.continues:
            messages = [*messages[:-1], _opened(messages[-1] if messages else {})]
        text = self._rendered(messages, how, now)
        if shown is not as_it_is:
            # A template that prints a list or an object may spell it as an escape.
            text = text.replace(_SPELLED, GUARD)
        if not how.continues:
            return text
        before, found, _ = text.rpartition(_OPEN_END)
        if not found:
            raise FormatError(
                "the model's chat template does not show the last message as it is, so it cannot "
                "be continued: ask a question instead"
            )
        return before

    def turns(self) -> ChatTurns:
        """The strings around messages; FormatError if the template rewrites or reorders them."""
        user, answer, second = _MARKS
        talk = [
            {"role": role, "content": mark}
            for role, mark in zip(("user", "assistant", "user"), _MARKS, strict=True)
        ]
        asked = self.render(talk[:1], ANSWER)
        answered = self.render(talk[:2])
        again = self.render(talk, ANSWER)
        opening, to_answer = _around(asked, user)
        _, closing = _around(answered, answer)
        _, after = _around(again, answer)
        to_user, _ = _around(after, second)
        if not to_answer.strip() or not to_user.strip():
            raise FormatError(
                "the model's chat template puts nothing between messages, so their ends cannot be "
                "seen: correct chat_template.jinja"
            )
        return ChatTurns(opening, to_answer, to_user, closing)

    def _rendered(self, messages: Messages, how: Rendering, now: datetime | None) -> str:
        from jinja2 import UndefinedError

        variables: dict[str, Any] = {
            "tools": None, "documents": None, **self.tokens, **how.variables,
            "messages": list(messages),
            "add_generation_prompt": how.answer_next and not how.continues,
        }  # fmt: skip
        if now is not None:
            variables[_CLOCK] = now.strftime
        try:
            try:
                return _compiled(self.source).render(variables)
            except UndefinedError as error:
                if error.message != f"'{_CLOCK}' is undefined":
                    raise
                return _compiled(self.source).render(variables | {_CLOCK: FIXED_TIME.strftime})
        except _Refusal as refusal:
            raise FormatError(
                f"the model's chat template refuses these messages: {refusal}"
                + self._advice(messages, how, now)
            ) from None
        # A stranger's program may fail in any way.
        except Exception as error:
            filled = [{**message, "content": message.get("content") or ""} for message in messages]
            if filled != list(messages) and self._renders(filled, how, now):
                raise FormatError(
                    "the model's chat template takes no message without content, such as one that "
                    "calls a tool: give it content, or omit it"
                ) from None
            raise FormatError(
                f"the model's chat template cannot be rendered ({reason(error)}): correct "
                "chat_template.jinja"
            ) from None

    def _advice(self, messages: Messages, how: Rendering, now: datetime | None) -> str:
        """What to omit, if the template accepts the rest: the system message, or tools."""
        for role, name in (("system", "the system message"), ("tool", "the messages of tools")):
            others = [message for message in messages if message.get("role") != role]
            if others and len(others) < len(messages) and self._renders(others, how, now):
                return f"; omit {name}"
        return ""

    def _renders(self, messages: Messages, how: Rendering, now: datetime | None) -> bool:
        try:
            self._rendered(messages, replace(how, continues=False), now)
        except SupraError:
            return False
        return True


def as_it_is(text: str, role: str) -> str:
    """``text`` unchanged, as a :data:`Shown`."""
    return text


class _Refusal(Exception):
    """A template called ``raise_exception``."""


def _shown(value: Any, role: str, shown: Shown) -> Any:
    """``value`` with every text in it changed, at any depth, names of fields included."""
    if isinstance(value, str):
        return shown(value.replace(GUARD, "\ufffd").replace(_OPEN_END, "\ufffd"), role)
    if isinstance(value, Mapping):
        return {
            _shown(name, role, shown): _shown(part, role, shown) for name, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [_shown(part, role, shown) for part in value]
    return value


def _opened(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with a mark at its end."""
    content = message.get("content")
    if message.get("role") != "assistant" or not isinstance(content, str):
        raise SupraError("only an answer can be continued: end with an assistant message of text")
    return {**message, "content": content + _OPEN_END}


def _around(text: str, mark: str) -> tuple[str, str]:
    """The text before and after the only ``mark``."""
    before, found, after = text.partition(mark)
    if not found or mark in after:
        raise FormatError(
            "the model's chat template does not show each message once as it is: correct "
            "chat_template.jinja"
        )
    return before, after


@lru_cache(maxsize=8)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


def _environment() -> Environment:
    """Set up as transformers does, in a sandbox: a template comes with a model from anywhere."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks text to train on; here only its body counts."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise _Refusal(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    return environment
