"""The files beside the weights: tokenizer, chat template, generation config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from supra_core.errors import FormatError
from supra_core.formats.inside import has_file, plain_name, read_bytes

# Files that are copied from a source folder; none of them can hold code.
ASSET_NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)

# Bytes of one of them; the largest vocabularies take some 40 MB.
ASSET_BYTES = 256_000_000


def read_assets(folder: Path) -> dict[str, bytes]:
    """The assets that ``folder`` holds, file name -> bytes.

    :class:`FormatError` for one that links out of the folder or is larger than ASSET_BYTES.
    """
    return {
        name: read_bytes(folder / name, ASSET_BYTES)
        for name in ASSET_NAMES
        if has_file(folder, name)
    }


def write_assets(folder: Path, assets: Mapping[str, bytes]) -> None:
    """Write each asset into ``folder``; names that are not plain, new file names are refused."""
    for name, content in assets.items():
        if not plain_name(name) or os.path.exists(folder / name):
            raise FormatError(f"asset '{name}' is not a new file name in {folder}: omit it")
        (folder / name).write_bytes(content)
