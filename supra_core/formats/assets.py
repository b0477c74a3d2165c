"""The files beside the weights: tokenizer, chat template, generation config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from supra_core.errors import FormatError

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


def read_assets(folder: Path) -> dict[str, bytes]:
    """The assets that ``folder`` holds, file name -> bytes."""
    return {name: (folder / name).read_bytes() for name in ASSET_NAMES if (folder / name).is_file()}


def write_assets(folder: Path, assets: Mapping[str, bytes]) -> None:
    """Write each asset into ``folder``; names that are not plain, new file names are refused."""
    for name, content in assets.items():
        if name != Path(name).name or (folder / name).exists():
            raise FormatError(f"asset '{name}' is no new file name in {folder}: leave it out")
        (folder / name).write_bytes(content)
