"""One tokenizer from whatever files a model states it in.

Folders state a tokenizer up to seven times: tokenizer.json, a SentencePiece model or a vocabulary
with merges, tokens in tokenizer_config.json, special_tokens_map.json and added_tokens.json, and a
chat template in one of three places. What counts is what transformers 5 makes of them; here it
becomes tokenizer.json, tokenizer_config.json and chat_template.jinja, which say the same to
everyone: the class that they state is loaded from tokenizer.json alone.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from supra_core.errors import FormatError, MissingDependencyError, SupraError
from supra_core.formats.assets import write_assets
from supra_core.formats.jsonfile import parse
from supra_core.text.worker import WORKER, Described, Result

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_TEMPLATE_JSON = "chat_template.json"
_SENTENCEPIECE, _VOCABULARY, _MERGES = "tokenizer.model", "vocab.json", "merges.txt"
_SPECIAL_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
_DECODER = "added_tokens_decoder"
# Files whose statements the others take over.
_MERGED = (_SPECIAL_MAP, _ADDED, _TEMPLATE_JSON, _VOCABULARY, _MERGES)

# The one class that every release of transformers, and mlx-lm with it, loads from tokenizer.json
# as it stands. Others, such as GPT2Tokenizer, bring a pre-tokenizer of their own.
_CLASS = "PreTrainedTokenizerFast"
# What else of tokenizer_config.json goes on; no field of it is code or a path.
_KEPT: dict[str, type | tuple[type, ...]] = {
    "chat_template": (str, list, dict), "clean_up_tokenization_spaces": bool, "padding_side": str,
    "truncation_side": str, "add_bos_token": bool, "add_eos_token": bool,
}  # fmt: skip
# Tokens named together, and what they are called in transformers 5.
_EXTRA = ("extra_special_tokens", "additional_special_tokens")


def one_tokenizer(assets: Mapping[str, bytes], where: str) -> dict[str, bytes]:
    """A source's assets with its tokenizer stated once; ``where`` names the source in errors.

    Files that are no part of a tokenizer stay as they are. Raises FormatError where the files are
    damaged, contradict each other in a token's id, or need code of their own.
    """
    files = dict(assets)
    if CONFIG in files or _SPECIAL_MAP in files or TOKENIZER in files:
        stated, added = _stated(files, where)
        if TOKENIZER in files:
            files[TOKENIZER] = _with_tokens(files[TOKENIZER], stated, added, where)
        elif _has_vocabulary(files):
            files |= _made(files, stated, where)
        elif "auto_map" in stated:
            raise FormatError(
                f"{where}: its tokenizer is code of its own (auto_map in {CONFIG}), which is never "
                f"run: take a version of the model that has a {TOKENIZER}"
            )
        files[CONFIG] = _json(_config(stated))
    elif _has_vocabulary(files):
        files |= _made(files, {}, where)
        files[CONFIG] = _json(_config({}))
    template = read_template(files, where)
    if _TEMPLATE_JSON in files and template is not None and TEMPLATE not in files:
        files[TEMPLATE] = template.encode()
    return {
        name: content
        for name, content in files.items()
        if name not in _MERGED or TOKENIZER not in files
    }


def read_template(assets: Mapping[str, bytes], where: str) -> str | None:
    """The chat template among a source's assets, None if there is none.

    As transformers keeps it: a file of its own, or a field of tokenizer_config.json, which may
    hold several by name.
    """
    if TEMPLATE in assets:
        try:
            return assets[TEMPLATE].decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(
                f"{where}: {TEMPLATE} is not UTF-8 text (byte {error.start}): get it again"
            ) from None
    for name in (CONFIG, _TEMPLATE_JSON):
        found = _object(assets, name, where).get("chat_template")
        if isinstance(found, list):
            named = [entry for entry in found if isinstance(entry, dict)]
            found = {str(entry.get("name")): entry.get("template") for entry in named}
        if isinstance(found, dict):
            found = found.get("default")
        if isinstance(found, str) and found:
            return found
    return None


def named_tokens(assets: Mapping[str, bytes], where: str) -> dict[str, str]:
    """``bos_token``, ``eos_token``, ... by name, as templates call them."""
    return _named(_stated(assets, where)[0])


def end_token(assets: Mapping[str, bytes], where: str) -> int | None:
    """The id of the token that the tokenizer itself names as the end of a text or turn."""
    stated, added = _stated(assets, where)
    name = _named(stated).get("eos_token")
    ids = [ident for ident, token in added.items() if token["content"] == name]
    if name is None or ids or TOKENIZER not in assets:
        return ids[0] if ids else None
    return tokenizer_of(assets[TOKENIZER], where).token_to_id(name)


def _stated(assets: Mapping[str, bytes], where: str) -> tuple[dict[str, Any], dict[int, Any]]:
    """What tokenizer_config.json says, and the tokens that are stated with their ids.

    As transformers: the older files count where it does not list its added tokens.
    """
    config = _object(assets, CONFIG, where)
    decoder = config.get(_DECODER)
    if decoder is None:
        config = {**config, **_object(assets, _SPECIAL_MAP, where)}
        special = set(_named(config).values()) | set(_extra(config))
        older = _object(assets, _ADDED, where)
        decoder = {
            str(ident): {"content": content, "special": content in special}
            for content, ident in older.items()
        }
        name = _ADDED
    else:
        name = f"{CONFIG}: {_DECODER}"
    if not isinstance(decoder, dict):
        raise FormatError(f"{where}: {name} must be an object: get the file again")
    added: dict[int, Any] = {}
    for ident, token in decoder.items():
        if not _is_id(ident) or not isinstance(token, dict) or not _is_token(token.get("content")):
            raise FormatError(
                f"{where}: {name} has '{ident}', which is no token: get the file again"
            )
        added[int(ident)] = token
    return config, added


def _with_tokens(
    content: bytes, stated: Mapping[str, Any], added: Mapping[int, Any], where: str
) -> bytes:
    """tokenizer.json with the tokens that other files state, at the ids that they state.

    Those that it has itself become what the others say of them, as transformers 5 has it.
    """
    named = (*_named(stated).values(), *_extra(stated))
    if not (added or named):
        return content
    listed = f"{CONFIG}: {_DECODER}" if stated.get(_DECODER) is not None else _ADDED
    known = tokenizer_of(content, where)
    for ident, token in added.items():
        if (own := known.token_to_id(token["content"])) not in (None, ident):
            raise FormatError(
                f"{where}: '{token['content']}' is token {ident} in {listed} and {own} in "
                f"{TOKENIZER}: get both files again"
            )
    # What is found whole in a text; a token of the vocabulary need not be.
    whole = {token.content: token for token in known.get_added_tokens_decoder().values()}
    new = {token["content"]: _added_token(token) for _, token in sorted(added.items())}
    for name in named:
        new.setdefault(name, whole.get(name) or _added_token({"content": name, "special": True}))
    # How a token is found counts by the newer statement alone; the older file does not say it.
    new = {
        name: token
        for name, token in new.items()
        if name not in whole or (listed != _ADDED and _flags(token) != _flags(whole[name]))
    }
    if not new:
        return content
    tokenizer = type(known).from_str(content.decode())
    tokenizer.add_tokens(list(new.values()))
    for ident, token in added.items():
        if tokenizer.token_to_id(token["content"]) != ident:
            raise FormatError(
                f"{where}: {listed} gives '{token['content']}' the id {ident}, which {TOKENIZER} "
                "has for another token or leaves a gap before: get both files again"
            )
    return str(tokenizer.to_str()).encode()


@lru_cache(maxsize=4)
def tokenizer_of(content: bytes, where: str) -> Tokenizer:
    """The library's tokenizer of a tokenizer.json, which nobody may change.

    Read in the process of its own first, then here. Kept, since a large one takes a second. Raises
    FormatError when it cannot be read.
    """
    described = Described("supra_core.text.files:readable", {"where": where}, content)
    WORKER.ask(described, "read", [], len(content))
    return read_tokenizer(content, where)


def readable(fields: Mapping[str, Any], content: bytes) -> Callable[[str, Sequence[Any]], Result]:
    """What answers :func:`tokenizer_of` in the process of its own."""
    read_tokenizer(content, fields["where"])
    return lambda job, given: (None, [])


@lru_cache(maxsize=4)
def read_tokenizer(content: bytes, where: str) -> Tokenizer:
    """As :func:`tokenizer_of`, here and now.

    It encodes texts whole and alone: what the file says of truncation and padding is left out.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content.decode())
        _refuse_growing(tokenizer)
        # Whoever saved the file left these set: every text would be cut, or filled up with pads.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    # The library raises bare Exception for what it cannot read, and panics are none even of these.
    except BaseException as error:
        raise reading_error(error, where) from None


# Characters that decoding may make of one.
MOST_GROWTH = 64


def _refuse_growing(tokenizer: Tokenizer) -> None:
    """ValueError for replacements that make more and more of the text of a token."""
    if tokenizer.decoder is None:
        return
    steps, growth = [json.loads(tokenizer.decoder.__getstate__())], 1.0
    while steps:
        step = steps.pop()
        steps += step.get("decoders", [])
        if step.get("type") == "Replace":
            # A regular expression may take any time, and nobody's decoder has one.
            pattern = step["pattern"].get("String", "")
            growth *= max(1.0, len(step["content"]) / len(pattern)) if pattern else math.inf
    if growth > MOST_GROWTH:
        raise ValueError("its decoder makes long texts of short ones")


def reading_error(error: BaseException, where: str) -> BaseException:
    """What to raise for an error of the tokenizers library; itself where it is none of that."""
    if isinstance(error, SupraError):
        return error
    # What takes all memory ends the process that it is computed in.
    library = isinstance(error, Exception) and not isinstance(error, MemoryError)
    if library or type(error).__name__ == "PanicException":
        return FormatError(f"{where}: {TOKENIZER} cannot be used ({error}): get it again")
    return error


# --- tokenizers without a tokenizer.json ------------------------------------------------------


def _has_vocabulary(assets: Mapping[str, bytes]) -> bool:
    return _SENTENCEPIECE in assets or {_VOCABULARY, _MERGES} <= assets.keys()


def _made(assets: Mapping[str, bytes], stated: Mapping[str, Any], where: str) -> dict[str, bytes]:
    """tokenizer.json by transformers' own conversion, its vocabulary compared with the source's."""
    if find_spec("transformers") is None:
        raise MissingDependencyError(
            f"{where} has no {TOKENIZER}, and making one from {_SENTENCEPIECE} or {_VOCABULARY} "
            "needs transformers 5: pip install 'supra-lm[torch]' or 'transformers>=5.7'"
        )
    # The class decides on the conversion; what else the file says has no effect on it.
    kind = stated.get("tokenizer_class")
    config = {
        **_config(stated),
        "tokenizer_class": kind if isinstance(kind, str) else "LlamaTokenizer",
    }
    if isinstance(stated.get("legacy"), bool):
        config["legacy"] = stated["legacy"]
    names = (_SENTENCEPIECE, _VOCABULARY, _MERGES, _SPECIAL_MAP, _ADDED)
    known = {name: assets[name] for name in names if name in assets}
    with tempfile.TemporaryDirectory() as folder:
        write_assets(Path(folder), {**known, CONFIG: _json(config)})
        described = Described(
            "supra_core.text.files:converting", {"where": where, "folder": folder}, b""
        )
        content, _ = WORKER.ask(described, "convert", [], sum(map(len, known.values())))
    return {TOKENIZER: content.encode()}


def converting(fields: Mapping[str, Any], _: bytes) -> Callable[[str, Sequence[Any]], Result]:
    """What answers :func:`_made` in the process of its own: tokenizer.json of a folder's files."""
    transformers: Any = import_module("transformers")
    where, folder = fields["where"], Path(fields["folder"])
    try:
        made = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        content = str(made.backend_tokenizer.to_str())
    # The libraries raise whatever a stranger's file runs into.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(
            f"{where} has no {TOKENIZER}, and none can be made of its other files ({reason}): "
            "take a version of the model that has one"
        ) from None
    _check_pieces(made, folder, where)
    return lambda job, given: (content, [])


def _check_pieces(made: Any, folder: Path, where: str) -> None:
    """FormatError where a SentencePiece model and what was made of it name ids differently."""
    if not (folder / _SENTENCEPIECE).is_file():
        return
    library: Any = import_module("sentencepiece")
    pieces = library.SentencePieceProcessor(model_file=str(folder / _SENTENCEPIECE))
    for ident in range(pieces.get_piece_size()):
        if made.backend_tokenizer.id_to_token(ident) != pieces.id_to_piece(ident):
            raise FormatError(
                f"{where}: token {ident} is '{pieces.id_to_piece(ident)}' in {_SENTENCEPIECE}, and "
                "the conversion gives it another name: take a version of the model that has a "
                f"{TOKENIZER}"
            )


# --- fields -----------------------------------------------------------------------------------


def _config(stated: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json as it is written."""
    config: dict[str, Any] = {"tokenizer_class": _CLASS, **_named(stated)}
    if extra := _extra(stated):
        config["additional_special_tokens"] = extra
    config |= {
        name: stated[name] for name, kind in _KEPT.items() if isinstance(stated.get(name), kind)
    }
    return config


def _named(stated: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for name, token in stated.items():
        content = token.get("content") if isinstance(token, dict) else token
        if name.endswith("_token") and _is_token(content):
            named[name] = content
    return named


def _extra(stated: Mapping[str, Any]) -> list[str]:
    for field in _EXTRA:
        found = stated.get(field)
        values = list(found.values()) if isinstance(found, dict) else found
        if isinstance(values, list) and values:
            contents = [v.get("content") if isinstance(v, dict) else v for v in values]
            return [content for content in contents if _is_token(content)]
    return []


def _is_id(value: Any) -> bool:
    text = str(value)
    return not isinstance(value, bool) and text.isascii() and text.isdecimal() and len(text) < 10


def _is_token(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value)


def _flags(token: Any) -> tuple[bool, ...]:
    """How an added token is found, and whether it is text."""
    return (
        token.special, token.normalized, token.lstrip, token.rstrip, token.single_word,
    )  # fmt: skip


def _added_token(token: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken

    special = bool(token.get("special"))
    flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip", "single_word")}
    normalized = bool(token.get("normalized", not special))
    return AddedToken(token["content"], special=special, normalized=normalized, **flags)


def _object(assets: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    try:
        value = parse(assets.get(name, b"{}"))
    except ValueError as error:
        raise FormatError(f"{where}: {name} is not valid JSON ({error}): get it again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{where}: {name} must hold a JSON object: get it again")
    return value


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
