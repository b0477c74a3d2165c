"""The real model: conversion against transformers, forms against each other, folding."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from supra_core.conversion import fold as folding  # noqa: E402
from supra_core.conversion.linearize import LinearizeOptions, linearize  # noqa: E402
from supra_core.model.layout import parameter_count  # noqa: E402
from supra_core.sources.source import Source, open_source  # noqa: E402
from supra_torch.inference.backend import TorchBackend  # noqa: E402
from supra_torch.model.model import build  # noqa: E402

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def source(smollm2_gguf: Path) -> Source:
    return open_source(smollm2_gguf)


@pytest.fixture(scope="module")
def ids(source: Source) -> Any:
    """600 tokens of English that any Python has."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in ("class", "import", "with"))
    return source.tokenizer().encode(text).ids[None, :600]


def _torch(spec: Any, tensors: Any) -> TorchBackend:
    return TorchBackend(build(spec, tensors), torch.device("cpu"))


def test_converted_is_what_transformers_computes(
    source: Source, ids: Any, smollm2_gguf: Path
) -> None:
    pytest.importorskip("accelerate", reason="transformers asks for it to load a GGUF")
    import transformers

    # By transformers' own reader of GGUF, which its backend here does without.
    model = transformers.AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent,
        gguf_file=smollm2_gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids[:, :512])).logits.numpy()
    found = _torch(source.spec, source.tensors).logits(ids[:, :512])
    # The bound; two orders of summation in float32 differ by about 1e-4.
    assert np.abs(found - expected).max() <= 1e-3
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))


def test_linear_forms_agree(source: Source, ids: Any) -> None:
    model = _torch(*linearize(source.spec, source.tensors, LinearizeOptions()))
    whole = model.logits(ids)
    assert np.abs(model.logits(ids, form="recurrent") - whole).max() <= 1e-3
    # From a cut inside a chunk and inside the window, token by token.
    logits, state = model.prefill(ids[:, :571])
    assert np.abs(logits - whole[:, :571]).max() <= 1e-3
    for t in range(571, 600):
        last, state = model.step(ids[:, t], state)
        assert np.abs(last - whole[:, t]).max() <= 1e-3


@pytest.mark.parametrize("preset", ["windowed", "paper"])
def test_folding_changes_next_to_nothing(source: Source, ids: Any, preset: Any) -> None:
    spec, tensors = linearize(source.spec, source.tensors, LinearizeOptions(preset=preset))
    folded, fewer = folding.fold(spec, tensors)
    expected = _torch(spec, tensors).logits(ids[:, :200])
    found = _torch(folded, fewer).logits(ids[:, :200])
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error <= 1e-5
    # Vectors remain, biases and what a head learns: a few thousandths of a per cent a layer.
    assert parameter_count(folded) - parameter_count(source.spec) <= 30 * 1000
