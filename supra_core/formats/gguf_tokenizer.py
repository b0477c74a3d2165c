"""The tokenizer inside a GGUF file, as the files that Hugging Face's loaders read."""

from __future__ import annotations

import json
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from supra_core.errors import FormatError, MissingDependencyError
from supra_core.spec import ModelSpec

# The metadata under ``tokenizer.`` that transformers' converter takes, and its names for it.
_CONVERTER_KEYS = {
    "ggml.model": "tokenizer_type",
    "ggml.pre": "pre_tokenizer_type",
    "ggml.tokens": "tokens",
    "ggml.scores": "scores",
    "ggml.token_type": "token_type",
    "ggml.merges": "merges",
    "ggml.bos_token_id": "bos_token_id",
    "ggml.eos_token_id": "eos_token_id",
    "ggml.unknown_token_id": "unk_token_id",
    "ggml.padding_token_id": "pad_token_id",
    "ggml.add_space_prefix": "add_prefix_space",
}
_SPECIAL_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_assets(path: Path, metadata: dict[str, Any], spec: ModelSpec) -> dict[str, bytes]:
    """``tokenizer.json``, its config, the chat template and ``generation_config.json``.

    The conversion is transformers' own, so that the token ids are those of
    ``AutoTokenizer.from_pretrained(folder, gguf_file=name)``; it needs no torch.
    """
    assets = {"generation_config.json": _generation_config(spec)}
    if "tokenizer.ggml.tokens" in metadata:
        _check(path, metadata)
        assets |= _tokenizer_files(path, metadata)
    return assets


def _generation_config(spec: ModelSpec) -> bytes:
    eos = list(spec.eos_token_id)
    ids = {
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": spec.pad_token_id,
    }
    return _json({name: value for name, value in ids.items() if value is not None})


def _tokenizer_files(path: Path, metadata: dict[str, Any]) -> dict[str, bytes]:
    try:
        # Untyped where it is not missing; imported here because it takes a second.
        transformers: Any = import_module("transformers")
        converter: Any = import_module("transformers.integrations.gguf")
    except ImportError:
        raise MissingDependencyError(
            "the tokenizer inside a GGUF file is converted by transformers 5: "
            "pip install 'supra-lm[torch]' or 'transformers>=5.7'"
        ) from None
    described = {
        name: metadata[f"tokenizer.{key}"]
        for key, name in _CONVERTER_KEYS.items()
        if f"tokenizer.{key}" in metadata
    }
    try:
        backend, extra = converter.convert_gguf_tokenizer(
            metadata["general.architecture"], described
        )
        options = {**_options(metadata, described), **extra}
        return _saved(transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **options))
    # The libraries raise whatever a stranger's lists run into, bare Exception among it.
    except Exception as error:
        raise FormatError(
            f"{path}: its tokenizer cannot be converted ({error}): convert from the Hugging Face "
            "folder instead"
        ) from None


def _check(path: Path, metadata: dict[str, Any]) -> None:
    """The types of what the converter takes: it checks none, and prints some to the terminal."""
    tokens = metadata["tokenizer.ggml.tokens"]
    count = len(tokens) if isinstance(tokens, list) else 0
    lists: dict[str, tuple[type | tuple[type, ...], int | None]] = {
        "ggml.tokens": (str, count),
        "ggml.merges": (str, None),
        "ggml.scores": ((int, float), count),
        "ggml.token_type": (int, count),
    }
    for key, (kind, length) in lists.items():
        value = metadata.get(f"tokenizer.{key}")
        if value is not None and not (
            isinstance(value, list)
            and all(isinstance(entry, kind) for entry in value)
            and length in (None, len(value))
        ):
            raise _wrong(path, key, f"must be a list of the vocabulary's {count} entries")
    for key in ("ggml.model", "ggml.pre", "chat_template"):
        if not isinstance(metadata.get(f"tokenizer.{key}", ""), str):
            raise _wrong(path, key, "must be a string")
    for name in _SPECIAL_TOKENS.values():
        token = metadata.get(f"tokenizer.ggml.{name}", 0)
        if type(token) is not int or not 0 <= token < max(count, 1):
            raise _wrong(path, f"ggml.{name}", f"is no id among {count} tokens")
    for name in ("ggml.add_bos_token", "ggml.add_eos_token", "ggml.add_space_prefix"):
        if not isinstance(metadata.get(f"tokenizer.{name}", False), bool):
            raise _wrong(path, name, "must be true or false")


def _wrong(path: Path, key: str, problem: str) -> FormatError:
    return FormatError(f"{path}: tokenizer.{key} {problem}: get the file again")


def _options(metadata: dict[str, Any], described: dict[str, Any]) -> dict[str, Any]:
    """Special tokens, whether BOS and EOS are added, and the chat template."""
    tokens = described["tokens"]
    options: dict[str, Any] = {}
    for name, key in _SPECIAL_TOKENS.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}")
        options[name] = None if token_id is None else tokens[token_id]
    for name in ("add_bos_token", "add_eos_token"):
        if f"tokenizer.ggml.{name}" in metadata:
            options[name] = metadata[f"tokenizer.ggml.{name}"]
    if described.get("tokenizer_type") == "llama":
        # Older files do not say it, and llama.cpp adds BOS to a SentencePiece vocabulary.
        options.setdefault("add_bos_token", True)
    if "tokenizer.chat_template" in metadata:
        options["chat_template"] = metadata["tokenizer.chat_template"]
    return options


def _saved(tokenizer: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    config = json.loads(files["tokenizer_config.json"])
    # The one class name that every release of transformers loads from tokenizer.json alone.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name in ("backend", "is_local", "local_files_only", "model_max_length"):
        config.pop(name, None)
    return {**files, "tokenizer_config.json": _json(config)}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
