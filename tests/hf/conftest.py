"""What transformers copies of our folders' code stays among the tests' own files."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import dynamic_module_utils

    before = dynamic_module_utils.HF_MODULES_CACHE
    place = str(tmp_path_factory.mktemp("modules"))
    dynamic_module_utils.HF_MODULES_CACHE = place
    yield
    dynamic_module_utils.HF_MODULES_CACHE = before
    sys.path[:] = [path for path in sys.path if path != place]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars among the tests' output."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()
