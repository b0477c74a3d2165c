"""The files beside the weights: tokenizer, chat template, generation config."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from supra_core.errors import FormatError
from supra_core.formats.inside import has_file, open_regular, plain_name
from supra_core.formats.lfs import refuse_pointer

# Copied from a source folder where they are there; nothing that could be code is.
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

    :class:`FormatError` for one that is a link out of the folder, or larger than any is.
    """
    return {name: _content(folder / name) for name in ASSET_NAMES if has_file(folder, name)}


def write_assets(folder: Path, assets: Mapping[str, bytes]) -> None:
    """Write each asset into ``folder``; names that are not plain, new file names are refused."""
    for name, content in assets.items():
        if not plain_name(name) or os.path.exists(folder / name):
            raise FormatError(f"asset '{name}' is no new file name in {folder}: leave it out")
        (folder / name).write_bytes(content)


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            content = file.read(ASSET_BYTES + 1)
    except OSError as error:
        raise FormatError(f"{path} cannot be read ({error.strerror}): check the file") from None
    refuse_pointer(path, content)
    if len(content) > ASSET_BYTES:
        raise FormatError(f"{path} is larger than {ASSET_BYTES:,} bytes: get the file again")
    return content
