"""One tokenizer from the files of a model, which may state it in several ways.

Folders state a tokenizer up to seven times: tokenizer.json, a SentencePiece model or a vocabulary
with merges, tokens in tokenizer_config.json, special_tokens_map.json and added_tokens.json, and a
chat template in one of three places. The interpretation of transformers 5 counts; here it becomes
tokenizer.json, tokenizer_config.json and chat_template.jinja, which every program reads alike: the
class that they state is loaded from tokenizer.json alone.
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

from supra_core.errors import FormatError, MissingDependencyError, SupraError, reason
from supra_core.formats.assets import write_assets
from supra_core.formats.jsonfile import json_bytes, object_of
from supra_core.text.worker import WORKER, Described, Result

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_TEMPLATE_JSON = "chat_template.json"
_SENTENCEPIECE, _VOCABULARY, _MERGES = "tokenizer.model", "vocab.json", "merges.txt"
_SPECIAL_MAP, _ADDED = "special_tokens_map.json", "added_tokens.json"
_DECODER = "added_tokens_decoder"
# Files that the others replace.
_MERGED = (_SPECIAL_MAP, _ADDED, _TEMPLATE_JSON, _VOCABULARY, _MERGES)

# The only class that all releases of transformers, and mlx-lm, load from tokenizer.json unchanged:
# others, such as GPT2Tokenizer, add a pre-tokenizer of their own.
_CLASS = "PreTrainedTokenizerFast"
# Further fields of tokenizer_config.json that are kept; none of them is code or a path.
_KEPT: dict[str, type | tuple[type, ...]] = {
    "chat_template": (str, list, dict), "clean_up_tokenization_spaces": bool, "padding_side": str,
    "truncation_side": str, "add_bos_token": bool, "add_eos_token": bool,
}  # fmt: skip
# Lists of further tokens, by their name in transformers 5 and before.
_EXTRA = ("extra_special_tokens", "additional_special_tokens")


def one_tokenizer(assets: Mapping[str, bytes], where: str) -> dict[str, bytes]:
    """A source's assets with its tokenizer stated once; ``where`` names the source in errors.

    Other files stay as they are. Raises FormatError where the files are damaged, contradict each
    other in a token's id, or need code of their own.
    """
    files = dict(assets)
    has_vocabulary = _SENTENCEPIECE in files or {_VOCABULARY, _MERGES} <= files.keys()
    if has_vocabulary or {CONFIG, _SPECIAL_MAP, TOKENIZER} & files.keys():
        stated, added = _stated(files, where)
        if TOKENIZER in files:
            files[TOKENIZER] = _with_tokens(files[TOKENIZER], stated, added, where)
        elif has_vocabulary:
            files[TOKENIZER] = _made(files, stated, where)
        elif "auto_map" in stated:
            raise FormatError(
                f"{where}: its tokenizer is code of its own (auto_map in {CONFIG}), which is never "
                f"run: take a version of the model that has a {TOKENIZER}"
            )
        files[CONFIG] = json_bytes(_config(stated))
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

    As in transformers: a separate file, or a field of tokenizer_config.json, which may hold several
    by name.
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
    """``bos_token``, ``eos_token``, ... by the names that templates use."""
    return _named(_stated(assets, where)[0])


def end_token(assets: Mapping[str, bytes], where: str) -> int | None:
    """The id of the token that the tokenizer names as the end of a text or turn."""
    stated, added = _stated(assets, where)
    name = _named(stated).get("eos_token")
    ids = [ident for ident, token in added.items() if token["content"] == name]
    if name is None or ids or TOKENIZER not in assets:
        return ids[0] if ids else None
    return tokenizer_of(assets[TOKENIZER], where).token_to_id(name)


def _stated(assets: Mapping[str, bytes], where: str) -> tuple[dict[str, Any], dict[int, Any]]:
    """The fields of tokenizer_config.json, and the tokens that are stated with their ids.

    As in transformers, the older files count where it does not list its added tokens.
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
                f"{where}: {name} has '{ident}', which is not a token: get the file again"
            )
        added[int(ident)] = token
    return config, added


def _with_tokens(
    content: bytes, stated: Mapping[str, Any], added: Mapping[int, Any], where: str
) -> bytes:
    """tokenizer.json with the tokens that other files state, at the ids that they state.

    As in transformers 5, the other files decide on the flags of tokens that it has itself.
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
    # Tokens that are found whole in a text, unlike those of the vocabulary.
    whole = {token.content: token for token in known.get_added_tokens_decoder().values()}
    new = {token["content"]: _added_token(token) for _, token in sorted(added.items())}
    for name in named:
        new.setdefault(name, whole.get(name) or _added_token({"content": name, "special": True}))
    # Only the newer statement has flags; the older file states none.
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
    """The library's tokenizer of a tokenizer.json, cached: the caller must not change it.

    The child process reads it first, then this one. FormatError when it cannot be read.
    """
    described = Described("supra_core.text.files:readable", {"where": where}, content)
    WORKER.ask(described, "read", [], len(content))
    return read_tokenizer(content, where)


def readable(fields: Mapping[str, Any], content: bytes) -> Callable[[str, Sequence[Any]], Result]:
    """The child's answers for :func:`tokenizer_of`."""
    read_tokenizer(content, fields["where"])
    return lambda job, given: (None, [])


@lru_cache(maxsize=4)
def read_tokenizer(content: bytes, where: str) -> Tokenizer:
    """As :func:`tokenizer_of`, in this process.

    The file's settings of truncation and padding are ignored.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(content.decode())
        _refuse_growing(tokenizer)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer
    # The library raises bare Exception for what it cannot read, and panics are BaseExceptions.
    except BaseException as error:
        raise reading_error(error, where) from None


# Characters that decoding may make of one.
MOST_GROWTH = 64


def _refuse_growing(tokenizer: Tokenizer) -> None:
    """ValueError for a decoder whose replacements multiply the text of a token."""
    if tokenizer.decoder is None:
        return
    steps, growth = [json.loads(tokenizer.decoder.__getstate__())], 1.0
    while steps:
        step = steps.pop()
        steps += step.get("decoders", [])
        if step.get("type") == "Replace":
            # A regular expression may take any time, and no known decoder has one.
            pattern = step["pattern"].get("String", "")
            growth *= max(1.0, len(step["content"]) / len(pattern)) if pattern else math.inf
    if growth > MOST_GROWTH:
        raise ValueError("its decoder makes long texts of short ones")


def reading_error(error: BaseException, where: str) -> BaseException:
    """A FormatError for an error of the tokenizers library; any other ``error`` itself."""
    if isinstance(error, SupraError):
        return error
    # A MemoryError ends the child process.
    library = isinstance(error, Exception) and not isinstance(error, MemoryError)
    if library or type(error).__name__ == "PanicException":
        return FormatError(f"{where}: {TOKENIZER} cannot be used ({error}): get it again")
    return error


# --- tokenizers without a tokenizer.json ------------------------------------------------------


def _made(assets: Mapping[str, bytes], stated: Mapping[str, Any], where: str) -> bytes:
    """tokenizer.json by transformers' own conversion, its vocabulary compared with the source's."""
    if find_spec("transformers") is None:
        raise MissingDependencyError(
            f"{where} has no {TOKENIZER}, and making one from {_SENTENCEPIECE} or {_VOCABULARY} "
            "needs transformers 5: pip install 'supra-lm[torch]' or 'transformers>=5.7'"
        )
    # The class decides on the conversion; other fields of the file have no effect on it.
    kind = stated.get("tokenizer_class")
    kind = kind if isinstance(kind, str) else "LlamaTokenizer"
    config = {**_config(stated), "tokenizer_class": kind}
    if isinstance(stated.get("legacy"), bool):
        config["legacy"] = stated["legacy"]
    names = (_SENTENCEPIECE, _VOCABULARY, _MERGES, _SPECIAL_MAP, _ADDED)
    known = {name: assets[name] for name in names if name in assets}
    with tempfile.TemporaryDirectory() as folder:
        write_assets(Path(folder), {**known, CONFIG: json_bytes(config)})
        fields = {"where": where, "folder": folder}
        described = Described("supra_core.text.files:converting", fields, b"")
        content, _ = WORKER.ask(described, "convert", [], sum(map(len, known.values())))
    return str(content).encode()


def converting(fields: Mapping[str, Any], _: bytes) -> Callable[[str, Sequence[Any]], Result]:
    """The child's answers for :func:`_made`: the tokenizer.json of a folder's files."""
    transformers: Any = import_module("transformers")
    where, folder = fields["where"], Path(fields["folder"])
    try:
        made = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        content = str(made.backend_tokenizer.to_str())
    # The libraries may raise anything for a stranger's file.
    except Exception as error:
        raise FormatError(
            f"{where} has no {TOKENIZER}, and its other files cannot be converted to one "
            f"({reason(error)}): take a version of the model that has one"
        ) from None
    _check_pieces(made, folder, where)
    return lambda job, given: (content, [])


def _check_pieces(made: Any, folder: Path, where: str) -> None:
    """FormatError where the conversion of a SentencePiece model gives an id another name."""
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
    extra = _extra(stated)
    kept = {n: stated[n] for n, kind in _KEPT.items() if isinstance(stated.get(n), kind)}
    listed = {"additional_special_tokens": extra} if extra else {}
    return {"tokenizer_class": _CLASS, **_named(stated), **listed, **kept}


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
    """How an added token is found, and whether it is special."""
    return token.special, token.normalized, token.lstrip, token.rstrip, token.single_word


def _added_token(token: Mapping[str, Any]) -> Any:
    from tokenizers import AddedToken

    special = bool(token.get("special"))
    flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip", "single_word")}
    normalized = bool(token.get("normalized", not special))
    return AddedToken(token["content"], special=special, normalized=normalized, **flags)


def _object(assets: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    return object_of(assets.get(name, b"{}"), f"{where}: {name}")
