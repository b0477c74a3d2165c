"""The settings of a short run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.torch.uptraining import EVEN_STAGES, SETTINGS

if TYPE_CHECKING:
    from supra_torch.uptrain.config import UptrainConfig


@pytest.fixture(scope="session")
def settings(tiny_transformer: Path, text_file: Path) -> UptrainConfig:
    from supra_torch.uptrain.config import resolve

    return resolve(
        config=None, model=str(tiny_transformer), recipe=None, data=str(text_file),
        overrides={**SETTINGS, **EVEN_STAGES},
    )  # fmt: skip
