"""What the lm-eval harness is given, as far as it can be told without the harness."""

from __future__ import annotations

import pytest

from supra_core.scoring import Pair

pytest.importorskip("torch")

from supra_torch.evaluate import _pair  # noqa: E402


def test_a_context_without_a_token_is_the_prefix() -> None:
    assert _pair([], [4, 5], 7) == Pair((7,), (4, 5))
    assert _pair([3], [4, 5], 7) == Pair((3,), (4, 5))
