"""A model as transformers itself computes it, to compare ours with.

transformers sees no file of a source, since a field of a config or a file beside it can make it
load code: it gets a config written from our spec, and the tensors that our readers checked.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from supra_core.errors import SupraError
from supra_core.formats.huggingface import for_library
from supra_core.measure.perplexity import Greedy, Losses
from supra_core.model.spec import ModelSpec
from supra_core.runtime.backend import Form, Ids, Logits, Mask, StateArrays
from supra_core.sources.source import Source, open_source
from supra_core.tensors import LazyTensor
from supra_torch.model.model import to_torch


class TransformersBackend:
    """A causal language model of transformers, on the CPU; its state is its KV cache."""

    name = "transformers"

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        self._model = model
        self.spec = spec

    def logits(self, ids: Ids, *, mask: Mask | None = None, form: Form = "parallel") -> Logits:
        """Logits (B, T, V), float32; ``recurrent`` and ``step`` feed one token a call."""
        if form == "parallel":
            return _numpy(self._forward(ids, mask=mask).logits)
        state, columns = None, []
        for t in range(np.shape(ids)[1]):
            column = None if mask is None else mask[:, t : t + 1]
            logits, state = self.prefill(ids[:, t : t + 1], state, mask=column)
            columns.append(logits)
        return np.concatenate(columns, axis=1)

    def prefill(
        self, ids: Ids, state: Any = None, *, mask: Mask | None = None
    ) -> tuple[Logits, Any]:
        """Logits (B, T, V) and the cache after ids, going on from ``state``."""
        if mask is not None and not mask.all():
            raise SupraError(
                "the transformers backend keeps a cache only without padding: use logits, or "
                "sequences of one length"
            )
        output = self._forward(ids, cache=copy.deepcopy(state), use_cache=True)
        return _numpy(output.logits), output.past_key_values

    def step(self, ids: Ids, state: Any) -> tuple[Logits, Any]:
        """Logits (B, V) and the cache after one more token each, ids (B,)."""
        logits, after = self.prefill(np.asarray(ids)[:, None], state)
        return logits[:, 0], after

    def token_scores(self, ids: Ids, *, form: Form = "parallel") -> tuple[Losses, Greedy]:
        """-log p of ids[:, 1:] in nats, and whether each is the likeliest, both (B, T - 1)."""
        logits = torch.from_numpy(self.logits(ids, form=form)[:, :-1])
        target = torch.from_numpy(np.asarray(ids, dtype=np.int64)[:, 1:])
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), reduction="none"
        )
        greedy = logits.argmax(dim=-1) == target
        return losses.reshape(target.shape).numpy(), greedy.numpy()

    def state_arrays(self, state: Any) -> StateArrays:
        """``LAYER.keys`` and ``LAYER.values``, each (B, K, T, d)."""
        arrays: StateArrays = {}
        for index, layer in enumerate(state.layers if state is not None else ()):
            arrays[f"{index}.keys"] = _numpy(layer.keys)
            arrays[f"{index}.values"] = _numpy(layer.values)
        return arrays

    def state_from_arrays(self, arrays: StateArrays) -> Any:
        """The inverse of :meth:`state_arrays`."""
        cache = transformers.DynamicCache(config=self._model.config)
        for index in range(len(arrays) // 2):
            keys, values = (
                torch.from_numpy(arrays[f"{index}.{name}"]).to(self._model.dtype)
                for name in ("keys", "values")
            )
            cache.update(keys, values, index)
        return cache

    def _forward(
        self, ids: Ids, *, mask: Mask | None = None, cache: Any = None, **more: Any
    ) -> Any:
        given: dict[str, Any] = {"past_key_values": cache, **more}
        if mask is not None:
            valid = torch.from_numpy(np.asarray(mask).astype(np.int64))
            given["attention_mask"] = valid
            given["position_ids"] = (valid.cumsum(dim=1) - 1).clamp(min=0)
        with torch.inference_mode():
            return self._model(torch.from_numpy(np.asarray(ids, dtype=np.int64)), **given)


def load(path: str | Path, *, dtype: str | None = None) -> TransformersBackend:
    """A plain transformer, anything that ``open_source`` opens; ``dtype`` None is float32."""
    source = open_source(path)
    model = causal_language_model(source, dtype=getattr(torch, dtype or "float32"))
    return TransformersBackend(model.eval(), source.spec)


def causal_language_model(source: Source, *, dtype: torch.dtype) -> Any:
    """transformers' own module, with torch's SDPA for attention where that can compute it.

    FormatError when the source is no transformer of a family that transformers has.
    """
    config, tensors = for_library("transformers", source.spec, source.tensors, str(source.path))
    capped = source.spec.attention_softcap is not None
    (architecture,) = config["architectures"]
    with _without_progress_bars():
        return getattr(transformers, architecture).from_pretrained(
            None,
            config=transformers.AutoConfig.for_model(**config),
            state_dict={name: _Unread(tensor) for name, tensor in tensors.items()},
            dtype=dtype,
            attn_implementation="eager" if capped else "sdpa",
            local_files_only=True,
        )


@dataclass(frozen=True)
class _Unread:
    """A tensor that transformers reads when its turn comes, as it does slices of safetensors."""

    tensor: LazyTensor

    def __getitem__(self, whole: EllipsisType) -> torch.Tensor:
        return to_torch(self.tensor)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _numpy(tensor: torch.Tensor) -> npt.NDArray[np.float32]:
    return tensor.detach().to(torch.float32).cpu().numpy()
