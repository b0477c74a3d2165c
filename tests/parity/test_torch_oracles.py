"""Torch and the reference against what the published implementation computed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file  # noqa: E402

from supra_core.formats.openlm.tensors import published_tensors  # noqa: E402
from supra_core.mixers import decay as decays  # noqa: E402
from supra_core.model.reference import ReferenceModel  # noqa: E402
from supra_core.runtime.backend import Form  # noqa: E402
from supra_core.sources.source import open_source  # noqa: E402
from supra_core.tensors import LazyTensor  # noqa: E402
from supra_torch.inference import backend  # noqa: E402
from supra_torch.model.model import SupraModel, build  # noqa: E402
from supra_torch.ops import linear_attention  # noqa: E402

# Stated with the outputs: their own float32 is within 6e-6 of float64.
LOGITS, STATES = 5e-5, 1e-4
FOLDERS = ["a_mha_decay", "b_gqa_decay"]
FORMS = [("parallel", "logits"), ("recurrent", "logits_recurrent"), ("step", "logits_step")]


@pytest.fixture(params=FOLDERS)
def folder(request: pytest.FixtureRequest, oracles: Path) -> Path:
    return oracles / request.param


@pytest.mark.parametrize(("form", "stored"), FORMS)
def test_reference_logits(folder: Path, form: Form, stored: str) -> None:
    source, ids = open_source(folder), np.load(folder / "input_ids.npy")
    found = ReferenceModel(source.spec, source.tensors).logits(ids, form=form)
    np.testing.assert_allclose(found, np.load(folder / f"{stored}.npy"), rtol=0, atol=LOGITS)


@pytest.mark.parametrize(("form", "stored"), FORMS)
def test_torch_logits(folder: Path, form: Form, stored: str) -> None:
    model, ids = backend.load(folder), np.load(folder / "input_ids.npy")
    expected = np.load(folder / f"{stored}.npy")
    np.testing.assert_allclose(model.logits(ids, form=form), expected, rtol=0, atol=LOGITS)


def test_torch_logits_in_the_dense_form(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = partial(linear_attention, implementation="reference")
    monkeypatch.setattr("supra_torch.model.mixers.linear.linear_attention", dense)
    ids = np.load(folder / "input_ids.npy")
    expected = np.load(folder / "logits.npy")
    np.testing.assert_allclose(backend.load(folder).logits(ids), expected, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("which", ["reference", "torch"])
def test_states(folder: Path, which: str) -> None:
    source, ids = open_source(folder), np.load(folder / "input_ids.npy")
    if which == "torch":
        model = backend.load(folder)
        _, after = model.prefill(ids)
        states = [layer["state"].numpy() for layer in after.layers]
    else:
        definition = ReferenceModel(source.spec, source.tensors)
        _, rows = definition.prefill(ids)
        layers = range(source.spec.num_hidden_layers)
        states = [np.stack([row.layers[i]["state"][0] for row in rows]) for i in layers]
    for index, layer in enumerate(source.spec.layers):
        slopes = decays.slopes(layer.mixer.decay, source.spec.num_attention_heads)
        # The published code stores gamma S.
        found = states[index] * np.exp(-slopes)[:, None, None]
        expected = np.load(folder / f"layer{index}_state.npy")
        np.testing.assert_allclose(found, expected, rtol=0, atol=STATES)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
def test_operator(folder: Path, implementation: Any) -> None:
    # Stored head first, after the repeat of grouped heads.
    q, k, v = (
        torch.from_numpy(np.load(folder / f"layer0_{name}.npy")).transpose(1, 2) for name in "qkv"
    )
    decay = torch.from_numpy(np.exp(-np.load(folder / "slopes.npy").astype(np.float64)))
    scaled = k / k.shape[-1] ** 0.5
    found, _ = linear_attention(q, scaled, v, decay.flatten(), implementation=implementation)
    expected = np.load(folder / "layer0_attn_raw.npy").swapaxes(1, 2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=LOGITS)


def test_greedy_tokens(folder: Path) -> None:
    expected = np.load(folder / "greedy_ids.npy")
    model = backend.load(folder)
    logits, state = model.prefill(expected[:, :16])
    last = logits[:, -1]
    for column in expected[:, 16:].T:
        np.testing.assert_array_equal(last.argmax(-1), column)
        last, state = model.step(column, state)


def test_gradients(folder: Path) -> None:
    source = open_source(folder)
    model = build(source.spec, source.tensors)
    ids = torch.from_numpy(np.load(folder / "input_ids.npy")).long()
    logits, _ = model(ids)
    total, entropy = _published_loss(logits[:, :-1], ids[:, 1:])
    stored = np.load(folder / "loss.npy")
    assert total.item() == pytest.approx(stored[0], rel=1e-5)
    assert entropy.item() == pytest.approx(stored[1], rel=1e-5)
    total.backward()
    expected = load_file(folder / "grads.safetensors")
    found = _published_gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        error = np.abs(found[name] - gradient).max()
        assert error <= 1e-4 * np.abs(gradient).max(), name


def _published_loss(logits: Any, targets: Any) -> tuple[Any, Any]:
    """[CE + 1e-4 mean(logsumexp^2), CE], the published training loss."""
    flat = logits.flatten(0, 1)
    entropy = torch.nn.functional.cross_entropy(flat, targets.flatten())
    return entropy + 1e-4 * flat.logsumexp(-1).square().mean(), entropy


def _published_gradients(model: SupraModel) -> dict[str, Any]:
    """Gradients under the published names: the layouts differ by stacking rows."""
    gradients = {
        name: LazyTensor.of(parameter.grad.numpy())
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    published = published_tensors(model.spec, gradients)
    return {name: tensor.read() for name, tensor in published.items()}


class TestConvertedMistral:
    """Folder g: a Mistral as it was, and made linear by the published code."""

    def test_softmax_logits(self, oracles: Path) -> None:
        folder = oracles / "g_convert_mistral"
        ids = np.load(folder / "input_ids.npy")
        expected = np.load(folder / "logits_hf_softmax.npy")
        source = open_source(folder / "hf_mistral")
        for found in (
            ReferenceModel(source.spec, source.tensors).logits(ids),
            backend.load(folder / "hf_mistral").logits(ids),
        ):
            np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS)

    def test_linear_logits(self, oracles: Path) -> None:
        folder = oracles / "g_convert_mistral"
        ids = np.load(folder / "input_ids.npy")
        expected = np.load(folder / "logits_linear.npy")
        source = open_source(
            folder / "linear_checkpoint.pt", config=folder / "openlm_linear_config.json"
        )
        model = backend.TorchBackend(build(source.spec, source.tensors), torch.device("cpu"))
        definition = ReferenceModel(source.spec, source.tensors)
        for found in (definition.logits(ids), model.logits(ids)):
            np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS)
