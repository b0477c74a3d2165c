"""Tokenizers and chat templates: the files that state them, with changes, and programs of jinja."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from supra_core.errors import SupraError
from supra_core.text import ModelTokenizer, Rendering, load_tokenizer
from supra_core.text.chat_template import ANSWER, WHOLE
from supra_core.text.files import end_token, one_tokenizer
from tests.fuzz.harness import Files, Format, tried
from tests.fuzz.mutations import Seeded, changed_bytes, changed_value
from tests.tiny_chat import CHATML, LLAMA3, MISTRAL
from tests.tiny_tokenizers import SPECIAL, byte_level, sentencepiece, with_bos

_VOCABULARY = 500
_TEXT = "Hi <|im_end|>, a\u2581b!\n\té\u0301 \U0001f600 12 \u202e\0"
_TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": "hi <|im_end|>"},
    {"role": "assistant", "content": "<think>yes</think> é"}, {"role": "user", "content": ""},
]  # fmt: skip
_NOW = datetime(2024, 7, 26, 23, 59)
Json = dict[str, Any]


# --- tokenizers -----------------------------------------------------------------------------


def _unigram() -> Tokenizer:
    pieces = [*((name, 0.0) for name in SPECIAL), ("<unk>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    pieces += [
        (piece, -1.5) for piece in ("\u2581", "\u2581a", "a", "b", "ab", "hi", "H", "i", ".")
    ]
    made = Tokenizer(models.Unigram(pieces, len(SPECIAL), True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = sentencepiece().decoder
    made.add_special_tokens(list(SPECIAL))
    return made


@cache
def _described() -> tuple[Json, ...]:
    """Every kind that models have, as tokenizer.json has it."""
    made = (
        byte_level(), sentencepiece(), _unigram(), with_bos(byte_level(), SPECIAL[0]),
        with_bos(sentencepiece(), SPECIAL[1]),
    )  # fmt: skip
    return tuple(json.loads(tokenizer.to_str()) for tokenizer in made)


_PATTERNS = ({"String": "a"}, {"String": ""}, {"String": "\u2581"}, {"Regex": "(a|b)+"},
             {"Regex": "("}, {"Regex": r"(a|aa){0,21}b|."}, {"Regex": ""})  # fmt: skip
_CONTENTS = ("", " ", "a", "aaaa", "\u2581", "é", "x" * 70)
_NORMALIZERS = ("NFC", "NFKD", "Lowercase", "StripAccents", "Nmt", "BertNormalizer", "ByteLevel")
_SPLITTERS = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts", "Digits")
_DECODERS = ("ByteFallback", "Fuse", "WordPiece", "BPEDecoder", "CTC", "Metaspace", "ByteLevel")
_BEHAVIORS = ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous")


def _replace(chance: Seeded) -> Json:
    return {"type": "Replace", "pattern": chance.one(_PATTERNS), "content": chance.one(_CONTENTS)}


def _several(chance: Seeded, field: str, part: Callable[[Seeded], Any]) -> Json:
    return {"type": "Sequence", field: [part(chance) for _ in range(chance.number(0, 4))]}


def _normalizer(chance: Seeded) -> Any:
    return (
        lambda: None,
        lambda: {"type": chance.one(_NORMALIZERS), "clean_text": True, "lowercase": True,
                 "handle_chinese_chars": True, "strip_accents": None},
        lambda: {"type": "Prepend", "prepend": chance.one(_CONTENTS)},
        lambda: {"type": "Strip", "strip_left": True, "strip_right": bool(chance.number(0, 1))},
        lambda: {"type": "Precompiled", "precompiled_charsmap": chance.one(("", "AAAA", "tAIAAA"))},
        lambda: _replace(chance),
        lambda: _several(chance, "normalizers", _normalizer),
    )[chance.number(0, 6)]()  # fmt: skip


def _pre_tokenizer(chance: Seeded) -> Any:
    flag = bool(chance.number(0, 1))
    return (
        lambda: None,
        lambda: {"type": chance.one(_SPLITTERS), "individual_digits": flag},
        lambda: {"type": "ByteLevel", "add_prefix_space": flag, "trim_offsets": flag,
                 "use_regex": bool(chance.number(0, 1))},
        lambda: {"type": "Metaspace", "replacement": chance.one(("\u2581", "a", "", "ab")),
                 "prepend_scheme": chance.one(("first", "always", "never")), "split": flag},
        lambda: {"type": "Split", "pattern": chance.one(_PATTERNS), "invert": flag,
                 "behavior": chance.one(_BEHAVIORS)},
        lambda: {"type": "Punctuation", "behavior": chance.one(_BEHAVIORS)},
        lambda: {"type": "FixedLength", "length": chance.one((0, 1, 5, 2**63))},
        lambda: _several(chance, "pretokenizers", _pre_tokenizer),
    )[chance.number(0, 7)]()  # fmt: skip


def _decoder(chance: Seeded) -> Any:
    number = partial(chance.one, (0, 1, 2, 9, 2**40))
    return (
        lambda: None,
        lambda: {"type": chance.one(_DECODERS), "prefix": chance.one(_CONTENTS), "cleanup": True,
                 "suffix": chance.one(_CONTENTS), "pad_token": "a", "word_delimiter_token": "b",
                 "replacement": chance.one(("\u2581", "a")), "prepend_scheme": "first",
                 "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        lambda: {"type": "Strip", "content": chance.one((" ", "a", "é")), "start": number(),
                 "stop": number()},
        lambda: _replace(chance),
        lambda: _several(chance, "decoders", _decoder),
    )[chance.number(0, 4)]()  # fmt: skip


def _template_part(chance: Seeded) -> Json:
    kind, ident = chance.number(0, 2), chance.one(("A", "B", *SPECIAL))
    part = {"id": ident, "type_id": chance.number(0, 1)}
    return {"SpecialToken": part} if kind else {"Sequence": part}


def _post_processor(chance: Seeded) -> Any:
    ids = lambda: [chance.one((0, 1, 2, 399, 2**31, 2**32 - 1))]  # noqa: E731
    name = partial(chance.one, SPECIAL)
    return (
        lambda: None,
        lambda: {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                 "use_regex": True},
        lambda: {"type": "TemplateProcessing",
                 "single": [_template_part(chance) for _ in range(chance.number(0, 4))],
                 "pair": [_template_part(chance) for _ in range(chance.number(0, 4))],
                 "special_tokens": {
                     t: {"id": t, "ids": ids(), "tokens": [t]} for t in {name(), name()}}},
        lambda: {"type": "BertProcessing", "sep": [name(), *ids()], "cls": [name(), *ids()]},
        lambda: {"type": "RobertaProcessing", "sep": [name(), *ids()], "cls": [name(), *ids()],
                 "trim_offsets": True, "add_prefix_space": False},
        lambda: _several(chance, "processors", _post_processor),
    )[chance.number(0, 5)]()  # fmt: skip


_PARTS: dict[str, Callable[[Seeded], Any]] = {
    "normalizer": _normalizer, "pre_tokenizer": _pre_tokenizer, "decoder": _decoder,
    "post_processor": _post_processor,
}  # fmt: skip


def _model(chance: Seeded, model: Json) -> Json:
    """The model with fields, pieces or merges of others."""
    model = dict(model)
    kind = chance.number(0, 4)
    if kind == 0:
        model["type"] = chance.one(("BPE", "Unigram", "WordPiece", "WordLevel"))
        for name in ("unk_token", "continuing_subword_prefix", "max_input_chars_per_word"):
            model.setdefault(name, chance.one(("<unk>", "##", 100, None)))
    elif kind == 1:
        fields = {n: v for n, v in model.items() if n not in ("vocab", "merges")}
        model |= changed_value(chance, fields)
    elif kind == 2 and "merges" in model:
        pieces = [*list(model["vocab"])[:40], "", "a", "zz", "a b"]
        new = [[chance.one(pieces) for _ in range(chance.one((2, 2, 2, 1, 3)))] for _ in range(3)]
        model["merges"] = [*new, *model["merges"][:50]]
    else:
        vocabulary = model["vocab"]
        entries = list(vocabulary.items() if isinstance(vocabulary, dict) else vocabulary)
        place = chance.number(0, len(entries) - 1)
        name = chance.one((entries[place][0], chance.one(entries)[0], "", *SPECIAL))
        numbers = (0, 1, 399, 400, 2**32 - 1, 2**32, -1, 0.5, -1e308, 1e308, None, "0")
        entries[place] = (name, chance.one(numbers))
        del entries[chance.one((1, 20, 300, 9999)) :]
        model["vocab"] = dict(entries) if isinstance(vocabulary, dict) else entries
    return model


def _tokenizer_json(chance: Seeded, described: Json) -> bytes:
    described = dict(described)
    for _ in range(chance.number(0, 2)):
        kind = chance.number(0, 5)
        if kind < 2:
            part = chance.one(tuple(_PARTS))
            described[part] = _PARTS[part](chance)
        elif kind == 2:
            described["model"] = _model(chance, described["model"])
        elif kind == 3:
            small = {name: value for name, value in described.items() if name != "model"}
            described = {"model": described["model"], **changed_value(chance, small)}
        elif kind == 4:
            token = {"id": chance.one((0, 3, 319, 320, 399, 5000, 2**32 - 1)), "special": True,
                     "content": chance.one(("<s>", "a", "", " ", *SPECIAL)), "lstrip": True,
                     "rstrip": True, "single_word": True, "normalized": True}  # fmt: skip
            if isinstance(described.get("added_tokens"), list):
                described["added_tokens"] = [*described["added_tokens"], token]
        else:
            cut = {"max_length": chance.one((0, 2, 2**63)), "strategy": "LongestFirst",
                   "stride": chance.one((0, 1, 9)), "direction": "Right"}  # fmt: skip
            described["truncation"] = cut
    content = json.dumps(described, ensure_ascii=bool(chance.number(0, 1)))
    encoded = content.encode("utf-8", "replace")
    return changed_bytes(chance, encoded, 2) if chance.number(0, 9) == 0 else encoded


_TOKEN = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False,
          "single_word": False, "special": True}  # fmt: skip
_CONFIG: Json = {
    "tokenizer_class": "LlamaTokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>",
    "unk_token": {"__type": "AddedToken", **_TOKEN}, "additional_special_tokens": ["<x>"],
    "added_tokens_decoder": {"0": {**_TOKEN, "content": "<|endoftext|>"}},
    "clean_up_tokenization_spaces": False, "add_bos_token": True, "model_max_length": 1e30,
    "chat_template": CHATML,
}  # fmt: skip


def _drawn_tokenizer(random: Random) -> tuple[Files, str]:
    chance = Seeded(random)
    described = chance.one(_described())
    # Where a token that only the other files state belongs.
    size, added = len(described["model"]["vocab"]), dict(_CONFIG["added_tokens_decoder"])
    added[str(chance.one((size, size, size, size + 1, 5)))] = _TOKEN
    config = {**_CONFIG, "added_tokens_decoder": added}
    for _ in range(chance.number(0, 6)):
        del config[chance.one(sorted(config))]
    template = chance.one((CHATML, LLAMA3, MISTRAL))
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": template}]
    stated: dict[str, Any] = {
        "tokenizer_config.json": config,
        "special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": _TOKEN,
                                    "additional_special_tokens": ["<x>", _TOKEN]},
        "added_tokens.json": {"<s>": chance.one((size, size, size + 1)), "<|im_end|>": 2},
        "chat_template.json": {"chat_template": chance.one((template, named))},
    }  # fmt: skip
    files = {"tokenizer.json": _tokenizer_json(chance, described)}
    for name, value in stated.items():
        if chance.number(0, 3) == 0:
            continue
        other = changed_value(chance, value) if chance.number(0, 3) == 0 else value
        content = json.dumps(other).encode()
        if chance.number(0, 19) == 0:
            content = changed_bytes(chance, content, 2)
        files[name] = content
    if chance.number(0, 199) == 0:
        del files["tokenizer.json"]
    return files, ""


def _assets(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class _Tried:
    """Steps that each may be refused; one whose process was ended is the last."""

    def __init__(self) -> None:
        self.refused: list[SupraError] = []

    def __call__(self, action: Callable[[], Any]) -> Any:
        given = tried(self.refused, action)
        if self.refused and "so it was ended" in str(self.refused[-1]):
            raise self.refused[-1]
        return given


def _read_tokenizer(folder: Path) -> object:
    """What convert does with a tokenizer, and chat and serve with what it wrote."""
    assets, attempt = _assets(folder), _Tried()
    attempt(lambda: end_token(assets, "the model"))
    tokenizer = load_tokenizer(one_tokenizer(assets, "the model"), "the model", _VOCABULARY)
    encoded = attempt(lambda: tokenizer.encode(_TEXT))
    attempt(lambda: tokenizer.encode_batch([_TEXT, "", "a"]))
    attempt(lambda: tokenizer.encode_prompt("a b"))
    attempt(lambda: tokenizer.leading_form)
    attempt(tokenizer.beyond)
    _talk(tokenizer, attempt)
    ids = [] if encoded is None else encoded.ids.tolist()
    for some in (ids, list(range(0, _VOCABULARY, 7)), [_VOCABULARY - 1, 0, 70, 71]):
        attempt(lambda some=some: tokenizer.decode(some))
        attempt(lambda some=some: list(map(tokenizer.stream(some[:20]), some[:60])))
    if attempt.refused:
        raise attempt.refused[0]
    return tokenizer


def _talk(tokenizer: ModelTokenizer, attempt: _Tried) -> None:
    if tokenizer.template is None:
        return
    attempt(tokenizer.turns)
    attempt(lambda: tokenizer.render(_TALK, ANSWER))
    attempt(lambda: tokenizer.render(_TALK[:3], Rendering(continues=True), _NOW))


# --- templates ------------------------------------------------------------------------------

_NAMES = ("messages", "m", "loop", "x", "bos_token", "add_generation_prompt", "tools", "ns", "self",
          "range", "dict", "namespace", "cycler", "lipsum", "strftime_now", "raise_exception",
          "f", "varargs", "caller", "undefined_name", "_", "none", "true")  # fmt: skip
_ATTRIBUTES = ("content", "role", "index0", "first", "last", "items", "keys", "append", "pop",
               "__class__", "__globals__", "__init__", "mro", "format", "format_map", "strip",
               "split", "x", "previtem", "cycle", "changed", "tool_calls", "upper")  # fmt: skip
_FILTERS = ("trim", "tojson", "length", "upper", "join", "list", "first", "last", "sort", "map",
            "select('string')", "selectattr('role', 'equalto', 'user')", "default('x')", "safe",
            "replace('a', 'b')", "indent(4)", "center(9)", "batch(2)", "groupby('role')", "int",
            "float", "string", "dictsort", "attr('__class__')", "random", "reverse", "round(2)",
            "tojson(indent=2)", "format(1)", "sum", "unique", "urlize", "wordwrap(3)", "xmlattr",
            "map(attribute='content')", "slice(2)", "truncate(5)", "pprint", "escape", "min",
            "filesizeformat", "striptags", "nosuchfilter", "items")  # fmt: skip
_TESTS = ("defined", "string", "mapping", "iterable", "none", "undefined", "sequence", "odd",
          "divisibleby(0)", "in [1]", "callable", "sameas(x)", "eq 1", "nosuchtest")  # fmt: skip
_LITERALS = ("1", "0", "-1", "2.5", "'a'", "'<|im_end|>'", "''", "[]", "{}", "[1, 2]", "none",
             "true", "'\\ud800'", "'\\x1b[31m\\n'", "{'a': [1]}", "10**9", "'%s%s'", "'{0.a}'",
             "'\ufdd0'", "'x' * 50", "range(3)", "1e308")  # fmt: skip
_HEAVY = ("'x' * 10**9", "10**10**7", "range(10**9) | list", "'%999999999d' % 1", "range(99999)",
          "'x'.center(10**9)", "[0] * 10**9", "messages * 10**6")  # fmt: skip
_BINARY = ("+", "-", "*", "/", "//", "%", "~", "==", "!=", "<", ">=", "and", "or", "in", "not in")


def _expression(chance: Seeded, depth: int = 3) -> str:
    kind = chance.number(0, 11) if depth else chance.number(0, 3)
    inner = partial(_expression, chance, depth - 1)
    if kind < 2:
        return chance.one(_NAMES)
    if kind == 2:
        return "m.content"
    if kind == 3:
        return chance.one(_HEAVY if chance.number(0, 499) == 0 else _LITERALS)
    return (
        lambda: f"{inner()}.{chance.one(_ATTRIBUTES)}",
        lambda: f"{inner()}[{chance.one(('0', '-1', '1:', '::-1', inner()))}]",
        lambda: f"({inner()}) | {chance.one(_FILTERS)}",
        lambda: f"({inner()} {chance.one(_BINARY)} {inner()})",
        lambda: f"({inner()}) is {chance.one(('', 'not '))}{chance.one(_TESTS)}",
        lambda: f"{inner()}({', '.join(inner() for _ in range(chance.number(0, 2)))})",
        lambda: f"({inner()} if {inner()} else {inner()})",
        lambda: f"(not {inner()})",
    )[kind - 4]()


_BLOCKS = (
    "{{% for m in {e} %}}{b}{{% endfor %}}", "{{% for m in messages %}}{b}{{% endfor %}}",
    "{{% for m in messages if {e} %}}{b}{{% else %}}{b}{{% endfor %}}",
    "{{% for k, v in {e} recursive %}}{b}{{{{ loop({e}) }}}}{{% endfor %}}",
    "{{% if {e} %}}{b}{{% elif {e} %}}{b}{{% else %}}{b}{{% endif %}}",
    "{{% set x = {e} %}}", "{{% set ns.x = {e} %}}", "{{% set ns = namespace(x={e}) %}}",
    "{{% set x %}}{b}{{% endset %}}", "{{% macro f(x, y={e}) %}}{b}{{% endmacro %}}",
    "{{% call f({e}) %}}{b}{{% endcall %}}", "{{% filter upper %}}{b}{{% endfilter %}}",
    "{{% generation %}}{b}{{% endgeneration %}}", "{{% break %}}", "{{% continue %}}",
    "{{% with x = {e} %}}{b}{{% endwith %}}", "{{{{ raise_exception({e}) }}}}",
    "{{{{ strftime_now({e}) }}}}", "{{% raw %}}{b}{{% endraw %}}", "{{# {e} #}}",
    "{{% block c %}}{b}{{% endblock %}}", "{{% include {e} %}}", "{{% extends {e} %}}",
    "{{% import {e} as x %}}", "{{% do x %}}", "{{%- {e} -%}}", "{{% autoescape true %}}{b}",
    "{{{{ m.content }}}}", "{{{{ '<|im_start|>' + m.role + m.content }}}}", "<|im_end|>\n",
)  # fmt: skip


def _statements(chance: Seeded, depth: int = 3) -> str:
    out = []
    for _ in range(chance.number(0, 3)):
        kind = chance.number(0, 5)
        if kind == 0:
            out.append(chance.one(("a", "\n", "<|im_start|>", " {{", "%}", "é\u202e", "\ufdd1")))
        elif kind < 3 or not depth:
            out.append("{{ " + _expression(chance) + " }}")
        else:
            block = chance.one(_BLOCKS)
            body = _statements(chance, depth - 1)
            out.append(block.format(e=_expression(chance), b=body))
    return "".join(out)


def _drawn_template(random: Random) -> tuple[Files, str]:
    chance = Seeded(random)
    valid = chance.one((CHATML, LLAMA3, MISTRAL))
    kind = chance.number(0, 5)
    if kind < 2:
        program = changed_bytes(chance, valid.encode())
    elif kind == 2:
        # Into a program that is otherwise whole, between two of its statements.
        places = [place for place in range(len(valid)) if valid.startswith(("{%", "{{"), place)]
        at = chance.one(places)
        program = (valid[:at] + _statements(chance, 2) + valid[at:]).encode()
    elif kind == 3:
        at, to = sorted((chance.number(0, len(valid)), chance.number(0, len(valid))))
        program = (valid[:at] + _expression(chance) + valid[to:]).encode()
    else:
        program = _statements(chance).encode()
    if chance.number(0, 9):
        program = program.decode("utf-8", "replace").encode()
    files = {"chat_template.jinja": program}
    if chance.number(0, 5):
        config = {"bos_token": chance.one(("<s>", "", *SPECIAL)), "eos_token": "</s>"}
        files["tokenizer_config.json"] = json.dumps(config).encode()
    return files, ""


_TALKS: tuple[list[Json], ...] = (
    _TALK[1:], [*_TALK[:2], {**_TALK[2], "tool_calls": [{"function": {"name": "f"}}]},
                {"role": "tool", "content": "{}"}], [],
)  # fmt: skip


@cache
def _plain_tokenizer() -> bytes:
    return byte_level().to_str().encode()


def _read_template(folder: Path) -> object:
    """A conversation and its turns by a template: as chat, serve and data prepare write it."""
    assets, attempt = {"tokenizer.json": _plain_tokenizer(), **_assets(folder)}, _Tried()
    tokenizer = load_tokenizer(assets, "the model", _VOCABULARY)
    _talk(tokenizer, attempt)
    for number, messages in enumerate(_TALKS):
        how = WHOLE if number else Rendering(variables={"enable_thinking": False, "x": [1]})
        attempt(lambda messages=messages, how=how: tokenizer.render(messages, how))
    if attempt.refused:
        raise attempt.refused[0]
    return tokenizer


FORMATS = (
    Format.seeded("tokenizer", _drawn_tokenizer, _read_tokenizer),
    Format.seeded("template", _drawn_template, _read_template),
)
