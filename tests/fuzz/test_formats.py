"""Files of every format that were changed: refused in one line, or read."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.formats import FORMATS
from tests.fuzz.harness import check_files
from tests.fuzz.run import fuzz


@pytest.mark.parametrize("name", FORMATS)
@settings(suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_refused_or_read(name: str, data: st.DataObject) -> None:
    form = FORMATS[name]
    check_files(*data.draw(form.cases()), form.read)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many(name: str) -> None:
    inputs = int(os.environ.get("SUPRA_FUZZ_INPUTS", "5000"))
    assert not fuzz(FORMATS[name], inputs, float("inf"), first_seed=1).failures
