"""The settings of a short run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.torch.uptraining import EVEN_STAGES, SETTINGS

if TYPE_CHECKING:
    from supra_torch.recipes.config import UptrainConfig


@pytest.fixture(scope="session")
def documents(text_file: Path) -> Path:
    """The text as documents of some dozen tokens each."""
    text = text_file.read_text()
    path = text_file.with_name("documents.jsonl")
    pieces = (text[first : first + 60] for first in range(0, len(text), 60))
    path.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return path


@pytest.fixture(scope="session")
def settings(tiny_transformer: Path, text_file: Path) -> UptrainConfig:
    """Transfer, then distillation of everything, a half of the tokens each."""
    from supra_torch.recipes.config import resolve

    config = resolve(
        config=None, model=str(tiny_transformer), recipe=None, data=str(text_file),
        overrides={**SETTINGS, **EVEN_STAGES},
    )  # fmt: skip
    return config.model_copy(update={"stages": config.stages[:2]})
