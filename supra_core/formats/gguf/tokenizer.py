"""The tokenizer of a GGUF file, as the files that Hugging Face's loaders read.

Token ids are those of llama.cpp. The tokenizer is built, read again, and compared with the file's
list of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supra_core.errors import FormatError
from supra_core.formats.gguf.pretokenizers import DEFAULT, PRE_TOKENIZERS, PreTokenizer
from supra_core.formats.jsonfile import json_bytes
from supra_core.model.spec import ModelSpec

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MODEL, _PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
_TOKENS, _MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
_SCORES, _KINDS = "tokenizer.ggml.scores", "tokenizer.ggml.token_type"
_PREFIX, _TEMPLATE = "tokenizer.ggml.add_space_prefix", "tokenizer.chat_template"
_BYTES, _PIECES = "gpt2", "llama"
# The kinds of files without a tokenizer.
_NONE = ("none", "no_vocab")
_UNKNOWN_KIND, _CONTROL_KIND, _USER_KIND = 2, 3, 4
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Steps of other kinds of tokenizer, which llama.cpp does not take in these two.
_NOT_DONE = ("remove_extra_whitespaces", "add_sep_token", "normalizer.lowercase")
_SPACE = "\u2581"
# Ends of a turn or a text: control tokens in llama.cpp, whatever a file calls them.
_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<|eom_id|>",
    "<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "</s>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
}  # fmt: skip


def holds_tokenizer(metadata: dict[str, Any]) -> bool:
    """Whether the file has a tokenizer."""
    return _TOKENS in metadata and metadata.get(_MODEL) not in _NONE


def tokenizer_notes(path: Path, metadata: dict[str, Any]) -> tuple[str, ...]:
    """Notes for the user about the tokenizer, one sentence each."""
    if not holds_tokenizer(metadata) or metadata.get(_MODEL) != _BYTES or metadata.get(_PRE):
        return ()
    return (
        f"{path} does not state {_PRE}: texts are split by llama.cpp's default, which may differ "
        "from the model's training",
    )


def tokenizer_assets(path: Path, metadata: dict[str, Any], spec: ModelSpec) -> dict[str, bytes]:
    """``tokenizer.json``, its config, the chat template and ``generation_config.json``.

    :class:`FormatError` if the file states a tokenizer that cannot be built.
    """
    eos = list(spec.eos_token_id)
    ids = {
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": spec.pad_token_id,
    }
    stated = {name: value for name, value in ids.items() if value is not None}
    assets = {"generation_config.json": json_bytes(stated)}
    if holds_tokenizer(metadata):
        _check(path, metadata)
        assets |= _tokenizer_files(path, metadata)
    return assets


def _tokenizer_files(path: Path, metadata: dict[str, Any]) -> dict[str, bytes]:
    tokens = _tokens(metadata)
    kind = _pre_tokenizer(path, metadata)
    ids = _special_ids(metadata)
    special = {name: None if ident is None else tokens[ident] for name, ident in ids.items()}
    adds = _additions(path, metadata, kind, special)
    try:
        tokenizer = _built(metadata, tokens, kind)
        _add_whole_tokens(tokenizer, metadata, tokens)
        _add_ends(tokenizer, adds, special)
        content = tokenizer.to_str(pretty=True)
        _verify(content, metadata, tokens, adds, special)
    # The library may raise anything for a stranger's lists, bare Exception included.
    except Exception as error:
        raise FormatError(
            f"{path}: its tokenizer cannot be built ({error}): convert from the Hugging Face "
            "folder instead"
        ) from None
    config = {
        # The only class name that all releases of transformers load from tokenizer.json alone.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in special.items() if token is not None},
        **adds,
    }
    files = {"tokenizer.json": content.encode(), "tokenizer_config.json": json_bytes(config)}
    if _TEMPLATE in metadata:
        files["chat_template.jinja"] = metadata[_TEMPLATE].encode()
    return files


# --- what the file states -------------------------------------------------------------------


def _check(path: Path, metadata: dict[str, Any]) -> None:
    """Check the types of all fields that are read here, and the kind of the tokenizer."""
    tokens = metadata[_TOKENS]
    count = len(tokens) if isinstance(tokens, list) else 0
    lists: dict[str, tuple[type | tuple[type, ...], int | None]] = {
        _TOKENS: (str, count),
        _MERGES: (str, None),
        _SCORES: ((int, float), count),
        _KINDS: (int, count),
    }
    for key, (kind, length) in lists.items():
        value = metadata.get(key)
        if value is not None and not (
            isinstance(value, list)
            and all(isinstance(entry, kind) for entry in value)
            and length in (None, len(value))
        ):
            raise _wrong(path, key, f"must be a list of the vocabulary's {count} entries")
    for key in (_MODEL, _PRE, _TEMPLATE):
        if not isinstance(metadata.get(key, ""), str):
            raise _wrong(path, key, "must be a string")
    for name in (*_SPECIAL_TOKENS.values(), "eot_token_id"):
        token = metadata.get(f"tokenizer.ggml.{name}", 0)
        if type(token) is not int or not 0 <= token < max(count, 1):
            raise _wrong(path, f"tokenizer.ggml.{name}", f"is not an id among {count} tokens")
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix", *_NOT_DONE):
        if not isinstance(metadata.get(f"tokenizer.ggml.{name}", False), bool):
            raise _wrong(path, f"tokenizer.ggml.{name}", "must be true or false")
    _check_supported(path, metadata)


def _check_supported(path: Path, metadata: dict[str, Any]) -> None:
    model = metadata.get(_MODEL)
    needed = {_BYTES: _MERGES, _PIECES: _SCORES}
    if model not in needed:
        raise _unsupported(path, f"{_MODEL} is {model!r} instead of {_BYTES!r} or {_PIECES!r}")
    if needed[model] not in metadata:
        raise _wrong(path, needed[model], f"is missing, which {_MODEL} {model!r} needs")
    prefix = ["add_space_prefix"] if model == _BYTES else []
    for name in (*_NOT_DONE, *prefix):
        if metadata.get(f"tokenizer.ggml.{name}"):
            raise _unsupported(path, f"tokenizer.ggml.{name} is true beside {_MODEL} {model!r}")
    if metadata.get("tokenizer.ggml.precompiled_charsmap"):
        raise _unsupported(path, "tokenizer.ggml.precompiled_charsmap is stated")


def _wrong(path: Path, key: str, problem: str) -> FormatError:
    return FormatError(f"{path}: {key} {problem}: get the file again")


def _unsupported(path: Path, problem: str) -> FormatError:
    return FormatError(
        f"{path}: {problem}, which is not supported: convert from the Hugging Face folder instead"
    )


def _tokens(metadata: dict[str, Any]) -> list[str]:
    """The list of tokens; empty ones get llama.cpp's name for them."""
    return [token or f"[EMPTY_{index}]" for index, token in enumerate(metadata[_TOKENS])]


def _pre_tokenizer(path: Path, metadata: dict[str, Any]) -> PreTokenizer | None:
    """How texts are split before merging; None where they are not."""
    if metadata[_MODEL] == _PIECES:
        return None
    name = metadata.get(_PRE) or DEFAULT
    if name not in PRE_TOKENIZERS:
        raise _unsupported(path, f"{_PRE} is {name!r}")
    return PRE_TOKENIZERS[name]


def _special_ids(metadata: dict[str, Any]) -> dict[str, int | None]:
    """The ids of the special tokens; a SentencePiece vocabulary always has an unknown one."""
    ids = {name: metadata.get(f"tokenizer.ggml.{key}") for name, key in _SPECIAL_TOKENS.items()}
    if metadata[_MODEL] == _PIECES and ids["unk_token"] is None and metadata[_TOKENS]:
        kinds = metadata.get(_KINDS, [])
        # llama.cpp's own default is the first.
        ids["unk_token"] = kinds.index(_UNKNOWN_KIND) if _UNKNOWN_KIND in kinds else 0
    return ids


def _additions(
    path: Path, metadata: dict[str, Any], kind: PreTokenizer | None, special: dict[str, str | None]
) -> dict[str, bool]:
    """Whether BOS and EOS are added to a text."""
    # llama.cpp adds BOS to a SentencePiece vocabulary unless the file says otherwise.
    defaults = {"add_bos_token": kind is None or kind.add_bos, "add_eos_token": False}
    adds = {
        name: bool(metadata.get(f"tokenizer.ggml.{name}", default))
        for name, default in defaults.items()
    }
    for name in adds:
        token = name.removeprefix("add_")
        if adds[name] and special[token] is None:
            raise _wrong(
                path,
                f"tokenizer.ggml.{_SPECIAL_TOKENS[token]}",
                f"is missing, though tokenizer.ggml.{name} is true (or true by default)",
            )
    return adds


# --- building -------------------------------------------------------------------------------


def _built(metadata: dict[str, Any], tokens: list[str], kind: PreTokenizer | None) -> Tokenizer:
    ids = {token: index for index, token in enumerate(tokens)}
    if len(ids) < len(tokens):
        raise ValueError("a token is there twice")
    if kind is None:
        unknown = _special_ids(metadata)["unk_token"]
        return _piece_tokenizer(metadata, ids, None if unknown is None else tokens[unknown])
    return _byte_tokenizer(metadata, ids, kind)


def _byte_tokenizer(metadata: dict[str, Any], ids: dict[str, int], kind: PreTokenizer) -> Tokenizer:
    """Byte-level BPE, by the merges of the file."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    merges = [_parts(merge) for merge in metadata[_MERGES]]
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=kind.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in kind.patterns]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _parts(merge: str) -> tuple[str, str]:
    """The two tokens of a merge; the first may begin with a space."""
    middle = merge.find(" ", 1)
    if middle < 0:
        raise ValueError(f"the merge {merge!r} has one part")
    return merge[:middle], merge[middle + 1 :]


def _piece_tokenizer(
    metadata: dict[str, Any], ids: dict[str, int], unknown: str | None
) -> Tokenizer:
    """SentencePiece's BPE, whose merges follow from the tokens' scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    prefixed = metadata.get(_PREFIX, True)
    tokenizer = Tokenizer(
        models.BPE(
            ids,
            list(_merges(ids, metadata[_SCORES])),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=all(f"<0x{byte:02X}>" in ids for byte in range(256)),
        )
    )
    # A space goes before each stretch of text between special tokens, before a space as well.
    prefix = [normalizers.Prepend(_SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefixed else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(ids: dict[str, int], scores: list[float]) -> Iterator[tuple[str, str]]:
    """All pairs of tokens that make a third one, in the order of its score, highest first."""
    for token in sorted(ids, key=lambda token: (-scores[ids[token]], ids[token])):
        for split in range(1, len(token)):
            if token[:split] in ids and token[split:] in ids:
                yield token[:split], token[split:]


def _add_whole_tokens(tokenizer: Tokenizer, metadata: dict[str, Any], tokens: list[str]) -> None:
    """Add the tokens that are found in a text before anything else is done to it."""
    from tokenizers import AddedToken

    special = {
        value
        for key, value in (*metadata.items(), ("_token_id", _special_ids(metadata)["unk_token"]))
        if key.endswith("_token_id") and type(value) is int
    }
    kinds = metadata.get(_KINDS, [])
    whole = []
    for index, token in enumerate(tokens):
        kind = kinds[index] if kinds else 0
        control = index in special or token in _ENDS or kind in (_CONTROL_KIND, _UNKNOWN_KIND)
        if control or kind == _USER_KIND:
            whole.append(AddedToken(token, normalized=False, special=control))
    tokenizer.add_tokens(whole)


def _add_ends(tokenizer: Tokenizer, adds: dict[str, bool], special: dict[str, str | None]) -> None:
    from tokenizers import processors

    bos = special["bos_token"] if adds["add_bos_token"] else None
    eos = special["eos_token"] if adds["add_eos_token"] else None
    if bos is None and eos is None:
        return
    before, after = [f"{bos}:0"] if bos else [], [f"{eos}:0"] if eos else []
    ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    single = [*before, "$A:0", *after]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, pair=[*single, *before, "$B:0", *after], special_tokens=ids
    )


def _verify(
    content: str,
    metadata: dict[str, Any],
    tokens: list[str],
    adds: dict[str, bool],
    special: dict[str, str | None],
) -> None:
    """Raise ValueError unless the tokenizer, read again, is the one that the file states."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(content)
    if tokenizer.get_vocab_size() != len(tokens):
        raise ValueError(f"{tokenizer.get_vocab_size()} tokens where the file has {len(tokens)}")
    for index, token in enumerate(tokens):
        if tokenizer.token_to_id(token) != index or tokenizer.id_to_token(index) != token:
            raise ValueError(f"token {index} is not {token!r} any more")
    around = [tokens.index(str(special[n])) for n in ("bos_token", "eos_token") if adds[f"add_{n}"]]
    if tokenizer.encode("").ids != around:
        raise ValueError("BOS and EOS are not added as the file says")
