"""Models as stock transformers loads them from our folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from supra_core.artifact import folder as artifact
from supra_core.model.spec import ModelSpec
from supra_core.tensors import TensorSource
from tests.tiny_models import lazy_weights

# What a user of stock transformers may not have.
ALONE = (
    "import sys\n"
    "class Absent:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name.split('.')[0] in ('supra_core', 'supra_torch', 'supra_mlx', 'supra_cli'):\n"
    "            raise ModuleNotFoundError(name)\n"
    "sys.meta_path.insert(0, Absent())\n"
)


def write(folder: Path, spec: ModelSpec, tensors: TensorSource | None = None) -> Path:
    """A folder of the model, with random weights unless they are given."""
    weights = lazy_weights(spec) if tensors is None else tensors
    artifact.write(folder, spec, weights, {}, dtype="float32")
    return folder


def load(folder: Path, **settings: Any) -> Any:
    """As a user does, in evaluation mode."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, **settings
    ).eval()


def logits(model: Any, ids: Any, **more: Any) -> Any:
    with torch.inference_mode():
        return model(torch.from_numpy(ids), **more).logits.float().numpy()


def in_pieces(model: Any, ids: Any, borders: list[int], mask: Any = None) -> Any:
    """Logits of one call a piece, each going on from the last one's cache."""
    columns, cache = [], None
    for start, end in zip([0, *borders], [*borders, ids.shape[1]], strict=True):
        more = {} if mask is None else {"attention_mask": torch.from_numpy(mask[:, :end]).long()}
        with torch.inference_mode():
            found = model(
                torch.from_numpy(ids[:, start:end]), past_key_values=cache, use_cache=True, **more
            )
        cache = found.past_key_values
        assert cache.get_seq_length() == end
        columns.append(found.logits.float().numpy())
    return np.concatenate(columns, axis=1)


def close(found: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """To a share of the expected ones' spread."""
    spread = float(expected.max() - expected.min())
    assert spread > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * spread)
