"""Safetensors that were changed: refused in one line, or read."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.formats import FORMATS
from tests.fuzz.harness import Files, check_files
from tests.fuzz.run import fuzz

FORMAT = FORMATS["safetensors"]


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=FORMAT.cases())
def test_refused_or_read(case: tuple[Files, str]) -> None:
    check_files(*case, FORMAT.read)


@pytest.mark.slow
def test_many() -> None:
    inputs = int(os.environ.get("SUPRA_FUZZ_INPUTS", "5000"))
    assert not fuzz(FORMAT, inputs, float("inf"), first_seed=1).failures
