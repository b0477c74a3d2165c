"""A stream far longer than anything that is kept: memory stays as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("torch")
pytest.importorskip("mlx.core")

from supra_cli.shared.speech import load_speaker  # noqa: E402
from supra_core.progress import silent  # noqa: E402
from supra_core.runtime.sampling import Sampling  # noqa: E402
from tests.mlx.chat import write_chat_model  # noqa: E402
from tests.mlx.models import SPECS  # noqa: E402

TOKENS = 200_000
BETWEEN = 10_000


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mlx", "torch"])
@pytest.mark.parametrize("name", ["windowed", "paper"])
def test_memory_is_flat(backend: str, name: str, tmp_path: Path) -> None:
    """200,000 tokens read, and the state they leave still speaks."""
    engine = load_speaker(str(write_chat_model(tmp_path / "model", SPECS[name])), backend).engine
    ids = np.random.default_rng(0).integers(3, 90, TOKENS).tolist()
    state, memory, sizes = engine.fresh(), [], []
    for start in range(0, TOKENS, BETWEEN):
        engine.feed(ids[start : start + BETWEEN], state, silent)
        memory.append(psutil.Process().memory_info().rss)
        sizes.append(sum(array.nbytes for array in engine.arrays(state).values()))
    assert max(memory) <= 1.02 * memory[0], [f"{m / 2**20:.1f} MiB" for m in memory]
    assert len(set(sizes)) == 1
    said = [token for token, _ in engine.generate([5], state, Sampling(max_tokens=20))]
    assert said


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_speaking_keeps_memory_flat(backend: str, tmp_path: Path) -> None:
    """Step by step, where a lazy graph would pile up."""
    folder = write_chat_model(tmp_path / "model", SPECS["windowed"])
    engine = load_speaker(str(folder), backend).engine
    state, memory, said = engine.fresh(), [], 0
    while said < 8_000:
        # A turn ends where it ends; the next goes on from its state.
        for _ in engine.generate([5], state, Sampling(1.0, max_tokens=1_000, seed=said)):
            said += 1
            if said % 1_000 == 0:
                memory.append(psutil.Process().memory_info().rss)
    assert max(memory[1:]) <= 1.02 * memory[0], [f"{m / 2**20:.1f} MiB" for m in memory]
