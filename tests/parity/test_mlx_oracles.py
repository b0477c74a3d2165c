"""MLX against what the published implementation computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core")

from supra_core.mixers import decay as decays  # noqa: E402
from supra_core.runtime.backend import Form  # noqa: E402
from supra_core.sources.source import open_source  # noqa: E402
from supra_mlx import backend, stock_backend  # noqa: E402
from supra_mlx.weights import load_source  # noqa: E402

# Stated with the outputs: their own float32 is within 6e-6 of float64.
LOGITS, STATES = 5e-5, 1e-4


@pytest.fixture(scope="module", params=["a_mha_decay", "b_gqa_decay"])
def case(request: pytest.FixtureRequest, oracles: Path) -> tuple[Path, Any, Any]:
    """The folder, the loaded model and the token ids (2, 96)."""
    folder = oracles / request.param
    return folder, backend.load(folder), np.load(folder / "input_ids.npy")


@pytest.mark.parametrize(
    ("form", "stored"),
    [("parallel", "logits"), ("recurrent", "logits_recurrent"), ("step", "logits_step")],
)
def test_logits(case: tuple[Path, Any, Any], form: Form, stored: str) -> None:
    folder, model, ids = case
    expected = np.load(folder / f"{stored}.npy")
    np.testing.assert_allclose(model.logits(ids, form=form), expected, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("by_step", [False, True], ids=["prefill", "step"])
def test_states(case: tuple[Path, Any, Any], by_step: bool) -> None:
    folder, model, ids = case
    if by_step:
        _, state = model.prefill(ids[:, :1])
        for token in ids[:, 1:].T:
            _, state = model.step(token, state)
    else:
        _, state = model.prefill(ids)
    arrays = model.state_arrays(state)
    for index, layer in enumerate(model.spec.layers):
        slopes = decays.slopes(layer.mixer.decay, model.spec.num_attention_heads)
        # The published code stores gamma S.
        found = arrays[f"layers.{index}.state"] * np.exp(-slopes)[:, None, None]
        expected = np.load(folder / f"layer{index}_state.npy")
        np.testing.assert_allclose(found, expected, rtol=0, atol=STATES)


def test_greedy_tokens(case: tuple[Path, Any, Any]) -> None:
    folder, model, _ = case
    expected = np.load(folder / "greedy_ids.npy")
    logits, state = model.prefill(expected[:, :16])
    last, tokens = logits[:, -1], []
    for _ in range(24):
        tokens.append(last.argmax(axis=-1))
        last, state = model.step(tokens[-1], state)
    np.testing.assert_array_equal(np.stack(tokens, axis=1), expected[:, 16:])


def test_a_transformer_folder(oracles: Path) -> None:
    folder = oracles / "g_convert_mistral"
    ids = np.load(folder / "input_ids.npy")
    expected = np.load(folder / "logits_hf_softmax.npy")
    for load in (backend.load, stock_backend.load):
        found = load(folder / "hf_mistral").logits(ids)
        np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS)


def test_a_converted_checkpoint(oracles: Path) -> None:
    folder = oracles / "g_convert_mistral"
    source = open_source(
        folder / "linear_checkpoint.pt", config=folder / "openlm_linear_config.json"
    )
    model = backend.MLXBackend(load_source(source))
    found = model.logits(np.load(folder / "input_ids.npy"))
    expected = np.load(folder / "logits_linear.npy")
    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS)
