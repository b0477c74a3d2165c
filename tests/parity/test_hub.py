"""A model of the hub in every backend, at the revision that its id names."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from supra_core.sources.source import open_source
from tests.fake_hub import Hub

BACKENDS = (
    "supra_core.runtime.reference_backend", "supra_torch.inference.backend",
    "supra_torch.inference.transformers_backend",
    "supra_mlx.backend", "supra_mlx.stock_backend",
)  # fmt: skip


@pytest.mark.parametrize("name", BACKENDS)
def test_of_a_revision(hub: Hub, tiny_transformer: Path, name: str) -> None:
    package = name.partition(".")[0]
    pytest.importorskip({"supra_torch": "torch", "supra_mlx": "mlx.core"}.get(package, package))
    load = import_module(name).load
    files = {file.name: file.read_bytes() for file in tiny_transformer.iterdir()}
    repository = hub.add("org/model", files)
    repository.refs["v1"] = repository.refs["main"]
    repository.commit({"config.json": b"{}", "model.safetensors": b"another model"})
    ids = np.arange(1, 9)[None]
    expected = load(open_source(tiny_transformer).path).logits(ids)
    np.testing.assert_array_equal(load("org/model@v1").logits(ids), expected)
