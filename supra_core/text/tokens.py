"""A model's tokenizer: text to token ids and back, and conversations by its chat template."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from supra_core.errors import FormatError, SupraError
from supra_core.text.chat_template import (
    GUARD,
    WHOLE,
    ChatTemplate,
    ChatTurns,
    Messages,
    Rendering,
    as_it_is,
)
from supra_core.text.files import (
    TOKENIZER,
    named_tokens,
    read_template,
    read_tokenizer,
    reading_error,
    tokenizer_of,
)
from supra_core.text.stream import TextStream
from supra_core.text.worker import Described, Result, worker_for

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Ids = npt.NDArray[np.int64]

NO_BOS = "no BOS"


@dataclass(frozen=True)
class EncodedText:
    """A text, its token ids (T,), and the character where each token ends (T,).

    ``begins``: tokens that every part of it needs in front; ``form`` describes them.
    """

    text: str
    ids: Ids
    ends: Ids
    begins: tuple[int, ...] = ()
    form: str = NO_BOS

    def head(self, tokens: int) -> EncodedText:
        """The first ``tokens`` tokens."""
        return replace(self, ids=self.ids[:tokens], ends=self.ends[:tokens])

    def byte_count(self, start: int, stop: int) -> int:
        """UTF-8 bytes of tokens start .. stop - 1."""
        first = int(self.ends[start - 1]) if start else 0
        return len(self.text[first : int(self.ends[stop - 1])].encode())


@dataclass(frozen=True)
class ModelTokenizer:
    """The tokenizer of a model, with its chat template if it has one.

    ``raw`` is only read, which several threads may do at a time. ``where`` names the model in
    errors. ``vocab_size``: rows of the model's embedding, or None; a text with a token beyond them
    is refused with SupraError.
    ``needs_bos``: documents, and texts that are measured, begin as the tokenizer begins a text.
    ``parse_markers``: markers of turns inside messages are markers; otherwise they are text.
    ``apart``: describes the tokenizer to the child process, which encodes and renders, since the
    files may be a stranger's; None: this process does.
    """

    raw: Tokenizer
    where: str = "the model"
    vocab_size: int | None = None
    template: ChatTemplate | None = None
    needs_bos: bool = False
    parse_markers: bool = False
    apart: Described | None = None

    # --- texts --------------------------------------------------------------------------------

    def encode(self, text: str) -> EncodedText:
        """``text`` as it stands: no BOS, no template."""
        _, (ids, ends) = self._ask("encode", [text], len(text))
        form = self.leading_form if self.begins else NO_BOS
        return EncodedText(text, self._checked(ids), ends, self.begins, form)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids (T,) of each text as it stands, on all cores; ids are not checked."""
        return self._ask("encode_batch", [list(texts)], sum(map(len, texts)))[1]

    def encode_prompt(self, text: str) -> list[int]:
        """``text`` after the :attr:`leading_ids`, as the lm-eval harness encodes a prompt.

        If the text begins with them, they are not added. Nothing is added at its end.
        """
        ids: list[int] = self.encode(text).ids.tolist()
        leading = self.leading_ids
        return ids if ids[: len(leading)] == leading else leading + ids

    @cached_property
    def leading_ids(self) -> list[int]:
        """The tokens that the tokenizer adds before every text: BOS in Llama, Mistral, Gemma."""
        ids: list[int] = self._ask("leading", [], 1)[0]
        return ids

    @property
    def begins(self) -> tuple[int, ...]:
        """The tokens before documents, and before each window of a text that is measured."""
        return tuple(self.leading_ids) if self.needs_bos else ()

    def rows(self, ids: Ids, length: int) -> Ids:
        """Ids (N length,) as rows (N, length); :attr:`begins` replace the first tokens of each."""
        rows = ids[: len(ids) // length * length].reshape(-1, length).copy()
        rows[:, : len(self.begins)] = self.begins[:length]
        return rows

    @property
    def leading_form(self) -> str:
        """The :attr:`leading_ids` as results state them."""
        names = [str(self.raw.id_to_token(index)) for index in self.leading_ids]
        return f"behind the tokenizer's own {' '.join(names)}" if names else NO_BOS

    def same_stretch(self, text: EncodedText) -> tuple[EncodedText, bool]:
        """The characters of another tokenizer's ``text``, and whether this one has the same tokens.

        If so, perplexities of the two compare; else only figures per byte do.
        """
        other = self.encode(text.text).head(len(text.ids))
        if np.array_equal(other.ids, text.ids):
            return other, True
        return self.encode(text.text[: int(text.ends[-1])]), False

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """The text of ``ids``, without special tokens unless ``special``."""
        with self._reading():
            return str(self.raw.decode(list(ids), skip_special_tokens=not special))

    def stream(self, after: Sequence[int] = ()) -> Callable[[int], str]:
        """Token -> the text that became certain with it; see :class:`TextStream`."""
        return TextStream(self.decode, after).take

    def beyond(self) -> dict[int, str]:
        """Tokens that the model has no embedding for, by id."""
        if self.vocab_size is None or self.raw.get_vocab_size() <= self.vocab_size:
            return {}
        vocabulary = self.raw.get_vocab()
        return dict(sorted((i, t) for t, i in vocabulary.items() if i >= self.vocab_size))

    # --- conversations ------------------------------------------------------------------------

    def render(
        self, messages: Messages, how: Rendering = WHOLE, now: datetime | None = None
    ) -> list[int]:
        """The conversation's token ids by the chat template; see :meth:`ChatTemplate.render`.

        SupraError when there is no template.
        """
        if self.template is None:
            raise SupraError(
                f"{self.where} has no chat template, so it takes no messages: give it plain text, "
                "or use a model made for chat"
            )
        talk = [dict(message) for message in messages]
        given = [talk, asdict(how), None if now is None else now.isoformat()]
        rendered = self._checked(self._ask("render", given, len(json.dumps(given)))[1][0])
        ids: list[int] = rendered.tolist()
        return ids

    def turns(self) -> ChatTurns | None:
        """The strings around messages, None without a template; see :meth:`ChatTemplate.turns`."""
        return None if self.template is None else ChatTurns(*self._ask("turns", [], 1)[0])

    # --- jobs, which a stranger's files compute -----------------------------------------------

    def _ask(self, job: str, given: Sequence[Any], characters: int) -> Result:
        """The result of :meth:`answer` in the child process, or in this one without ``apart``."""
        if self.apart is None:
            return self.answer(job, given)
        return worker_for(characters).ask(self.apart, job, given, characters)

    def answer(self, job: str, given: Sequence[Any]) -> Result:
        """The result of a job; JSON must be able to hold ``given``."""
        with self._reading():
            result: Result = getattr(self, f"_job_{job}")(*given)
            return result

    def _job_encode(self, text: str) -> Result:
        encoding = self.raw.encode(text, add_special_tokens=False)
        ends = [end for _, end in encoding.offsets]
        return None, [_array(encoding.ids), _array(ends)]

    def _job_encode_batch(self, texts: list[str]) -> Result:
        encoded = self.raw.encode_batch_fast(texts, add_special_tokens=False)
        return None, [_array(encoding.ids) for encoding in encoded]

    def _job_leading(self) -> Result:
        encoding = self.raw.encode("x")
        added = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
        return [index for index, _ in takewhile(lambda token: token[1], added)], []

    def _job_render(self, messages: Messages, how: Mapping[str, Any], now: str | None) -> Result:
        assert self.template is not None
        moment = None if now is None else datetime.fromisoformat(now)
        shown = as_it_is if self.parse_markers else self._guarded
        text = self.template.render(messages, Rendering(**how), moment, shown)
        if GUARD not in text:
            return None, [_array(self.raw.encode(text, add_special_tokens=False).ids)]
        guarding, own = self._guarding
        ids = guarding.encode(text, add_special_tokens=False).ids
        return None, [_array([own.get(ident, ident) for ident in ids])]

    def _job_turns(self) -> Result:
        assert self.template is not None
        turns = self.template.turns()
        return [turns.opening, turns.to_answer, turns.to_user, turns.closing], []

    def _guarded(self, text: str, role: str) -> str:
        """A message's text with GUARD inside everything that would be encoded as a marker.

        An answer may hold markers that are not special tokens, e.g. ``<think>``.
        """
        markers = self._special if role == "assistant" else self._markers
        if self._literal and not any(marker in text for marker in markers.values()):
            return text
        encoding = self.raw.encode(text, add_special_tokens=False)
        pieces, done = [], 0
        for ident, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if ident in markers and end > start:
                # Between all characters: part of a marker may be a marker, too.
                pieces += [text[done:start], GUARD.join(["", *text[start:end], ""])]
                done = end
        return "".join([*pieces, text[done:]])

    @cached_property
    def _special(self) -> dict[int, str]:
        tokens = self.raw.get_added_tokens_decoder()
        return {ident: token.content for ident, token in tokens.items() if token.special}

    @cached_property
    def _markers(self) -> dict[int, str]:
        """Tokens that divide turns: special ones, and others that the template names."""
        program = self.template.source if self.template is not None else ""
        named = {
            ident: token.content
            for ident, token in self.raw.get_added_tokens_decoder().items()
            if token.content.strip() and token.content in program
        }
        return self._special | named

    @cached_property
    def _literal(self) -> bool:
        """Whether a marker is found in a text only as it is spelled."""
        tokens = self.raw.get_added_tokens_decoder()
        return self.raw.normalizer is None or not any(
            tokens[ident].normalized for ident in self._markers
        )

    @cached_property
    def _guarding(self) -> tuple[Tokenizer, dict[int, int]]:
        """A tokenizer that finds no marker across GUARD and then ignores GUARD.

        Also the markers' ids, from that tokenizer to this one.
        """
        described = json.loads(self.raw.to_str())
        names = set(self._markers.values())
        for token in described["added_tokens"]:
            # Else markers would be found where GUARD is already removed.
            token["normalized"] &= token["content"] not in names
        guard = {"type": "Replace", "pattern": {"String": GUARD}, "content": ""}
        own = described.get("normalizer")
        steps = [guard] if own is None else [guard, own]
        described["normalizer"] = {"type": "Sequence", "normalizers": steps}
        _hide(described["model"], names)
        guarding = type(self.raw).from_str(json.dumps(described))
        pairs = ((guarding.token_to_id(name), ident) for ident, name in self._markers.items())
        ids = {there: here for there, here in pairs if there is not None}
        return guarding, ids

    # --- checks -------------------------------------------------------------------------------

    def _checked(self, ids: Ids) -> Ids:
        if problem := self.problem(ids):
            raise SupraError(problem)
        return ids

    def problem(self, ids: Ids) -> str | None:
        """Why the model cannot take ids (T,), None if it can."""
        if self.vocab_size is None or not len(ids) or int(ids.max()) < self.vocab_size:
            return None
        ident = int(ids.max())
        return (
            f"the text has '{self.raw.id_to_token(ident)}', token {ident}, for which {self.where} "
            f"has no embedding: it has {self.vocab_size:,}; remove that token"
        )

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns the library's errors with a stranger's file or a broken text into a SupraError."""
        try:
            yield
        except SupraError:
            raise
        except (TypeError, UnicodeEncodeError):
            raise SupraError(
                "the text holds half of a surrogate pair, which is not a character: correct it"
            ) from None
        except BaseException as error:
            raise reading_error(error, self.where) from None


def answering(fields: Mapping[str, Any], content: bytes) -> Callable[[str, Sequence[Any]], Result]:
    """The child's answers; see :class:`Described`."""
    template = None if fields["template"] is None else ChatTemplate(**fields["template"])
    raw = read_tokenizer(content, fields["where"])
    return ModelTokenizer(
        raw, fields["where"], template=template, parse_markers=fields["parse_markers"]
    ).answer


def _hide(model: dict[str, Any], names: set[str]) -> None:
    """Hide ``names`` in a tokenizer.json's model, which might encode a marker's text as them.

    Its name for unknown text stays.
    """
    hidden = {name: GUARD + name for name in names if name != model.get("unk_token")}
    vocabulary, merges = model["vocab"], model.get("merges", [])
    if isinstance(vocabulary, list):
        model["vocab"] = [[hidden.get(name, name), *rest] for name, *rest in vocabulary]
        return
    model["vocab"] = {hidden.get(name, name): ident for name, ident in vocabulary.items()}
    pairs = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges]
    model["merges"] = [pair for pair in pairs if not {*pair, "".join(pair)} & hidden.keys()]


def _array(values: Sequence[int]) -> Ids:
    return np.array(values, dtype=np.int64)


def load_tokenizer(
    assets: Mapping[str, bytes],
    where: str,
    vocab_size: int | None = None,
    *,
    needs_bos: bool = False,
    parse_markers: bool = False,
) -> ModelTokenizer:
    """The tokenizer among a source's assets, with its chat template; see :class:`ModelTokenizer`.

    Raises FormatError when there is none, or it cannot be read.
    """
    if TOKENIZER not in assets:
        raise FormatError(
            f"{where} has no tokenizer: give token ids, or copy {TOKENIZER} and "
            "tokenizer_config.json from the source model into it"
        )
    program = read_template(assets, where)
    template = None if program is None else ChatTemplate(program, named_tokens(assets, where))
    fields = {
        "where": where,
        "template": None if template is None else asdict(template),
        "parse_markers": parse_markers,
    }
    apart = Described("supra_core.text.tokens:answering", fields, assets[TOKENIZER])
    raw = tokenizer_of(assets[TOKENIZER], where)
    return ModelTokenizer(raw, where, vocab_size, template, needs_bos, parse_markers, apart)
