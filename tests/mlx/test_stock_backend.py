"""Stock mlx-lm behind the protocol, against the reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core")

from supra_core.errors import SupraError  # noqa: E402
from supra_core.runtime.backend import Form  # noqa: E402
from supra_core.sources.source import WRITERS  # noqa: E402
from supra_core.tensors import LazyTensor  # noqa: E402
from supra_mlx import stock_backend  # noqa: E402
from tests.mlx.chat import write_chat_model  # noqa: E402
from tests.mlx.models import SPECS, random_weights, reference  # noqa: E402

SPEC = replace(SPECS["transformer"], value_head_dim=SPECS["transformer"].head_dim)
SPEC = replace(SPEC, attention_bias="none")
# mlx-lm's float32 angles are wrong by position * 6e-8; otherwise as in test_model.
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama folder as Hugging Face writes it."""
    out = tmp_path_factory.mktemp("stock") / "llama"
    tensors = {name: LazyTensor.of(w) for name, w in random_weights(SPEC).items()}
    WRITERS["hf"](out, SPEC, tensors, {}, dtype="float32")
    return out


@pytest.fixture(scope="module")
def backend(folder: Path) -> Any:
    return stock_backend.load(folder)


@pytest.mark.parametrize("form", ["parallel", "recurrent", "step"])
def test_forms_and_left_padding(backend: Any, form: Form) -> None:
    ids = np.random.default_rng(1).integers(0, SPEC.vocab_size, (2, 50))
    mask = np.arange(50) >= np.array([[0], [13]])
    for given in (None, mask):
        expected = reference(SPEC).logits(ids, mask=given)
        found = backend.logits(ids, mask=given, form=form)
        real = np.ones_like(mask) if given is None else given
        np.testing.assert_allclose(found[real], expected[real], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("padded", [False, True])
def test_states_go_to_arrays_and_back(backend: Any, padded: bool) -> None:
    ids = np.random.default_rng(2).integers(0, SPEC.vocab_size, (2, 20))
    mask = np.arange(20) >= np.array([[0], [3]]) if padded else None
    _, state = backend.prefill(ids, mask=mask)
    restored = backend.state_from_arrays(backend.state_arrays(state))
    first, _ = backend.step(ids[:, 0], state)
    second, _ = backend.step(ids[:, 0], restored)
    np.testing.assert_array_equal(first, second)


def test_what_stock_mlx_lm_cannot_do(backend: Any, folder: Path, tmp_path: Path) -> None:
    ids = np.zeros((1, 4), dtype=np.int64)
    with pytest.raises(SupraError, match="padding on the left only"):
        backend.logits(ids, mask=np.array([[True, False, True, True]]))
    artifact = write_chat_model(tmp_path / "artifact", SPECS["paper"])
    with pytest.raises(SupraError, match=r"\(a model with linear-.*use another backend"):
        stock_backend.load(artifact)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    half = stock_backend.load(folder, dtype="bfloat16")
    assert half.logits(ids).dtype == np.float32


def test_why_mlx_lm_cannot_load_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str) -> None:
        raise ImportError(f"No module named '{name}'.")

    monkeypatch.setattr(stock_backend, "import_module", refused)
    message = r"cannot be run by stock mlx-lm \(No module named 'mlx_lm.models.llama'\): use"
    with pytest.raises(SupraError, match=message):
        stock_backend.load(folder)


def test_a_scaled_rope_has_the_name_that_mlx_lm_asks_for(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests.tiny_families import write

    write("phi3-longrope", tmp_path / "phi3")
    ids = np.zeros((1, 4), dtype=np.int64)
    assert np.isfinite(stock_backend.load(tmp_path / "phi3").logits(ids)).all()
