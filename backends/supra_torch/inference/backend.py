"""The Torch model behind the backend protocol: numpy in, numpy out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from supra_core.measure.perplexity import Greedy, Losses
from supra_core.runtime.backend import Form, Ids, Logits, Mask, StateArrays
from supra_core.sources.source import Source, open_source
from supra_core.tensors import dtype_named
from supra_torch.inference.decode import Decoders, captures
from supra_torch.model.model import SupraModel, build
from supra_torch.model.trunk import ModelState


class TorchBackend:
    """A loaded model. ``device``: where it computes."""

    name = "torch"

    def __init__(self, model: SupraModel, device: torch.device) -> None:
        self.spec = model.spec
        self.model = model.to(device).eval()
        self.device = device
        captured = captures(model.spec, device)
        self._decoders = Decoders(self.model, capture=True) if captured else None

    @torch.inference_mode()
    def logits(self, ids: Ids, *, mask: Mask | None = None, form: Form = "parallel") -> Logits:
        """Logits (B, T, V). ``recurrent`` is fed in two uneven pieces, ``step`` token by token."""
        state, logits = None, []
        for piece in _pieces(ids.shape[1], form):
            part = None if mask is None else mask[:, piece]
            found, state = self.prefill(ids[:, piece], state, mask=part)
            logits.append(found)
        return np.concatenate(logits, axis=1)

    @torch.inference_mode()
    def prefill(
        self, ids: Ids, state: ModelState | None = None, *, mask: Mask | None = None
    ) -> tuple[Logits, ModelState]:
        """Logits (B, T, V) and the state after ids (B, T)."""
        valid = None if mask is None else torch.from_numpy(np.asarray(mask)).to(self.device)
        logits, after = self.model(self._ids(ids), state, valid)
        return _numpy(logits), after

    @torch.inference_mode()
    def step(self, ids: Ids, state: ModelState) -> tuple[Logits, ModelState]:
        """Logits (B, V) and the state after ids (B,); by a CUDA graph if it can."""
        if self._decoders is not None:
            last, after = self._decoders.step(self._ids(ids), state)
            return _numpy(last), after
        logits, after = self.model(self._ids(ids)[:, None], state)
        return _numpy(logits[:, 0]), after

    @torch.inference_mode()
    def token_scores(self, ids: Ids, *, form: Form = "parallel") -> tuple[Losses, Greedy]:
        """-log p(ids[:, t + 1] | ids[:, :t + 1]) in nats, and whether it is the likeliest."""
        tokens = self._ids(ids)
        state, found = None, []
        for piece in _pieces(ids.shape[1], form):
            part, state = self.model.hidden(tokens[:, piece], state)
            found.append(part)
        hidden = torch.cat(found, dim=1)
        head = self.model.head_weight.to(hidden.dtype)
        # A row at a time: the logits are the largest tensor there is.
        rows = [
            _scores(self.model.capped(F.linear(h[:-1], head)), row[1:])
            for h, row in zip(hidden, tokens, strict=True)
        ]
        losses, greedy = (torch.stack(part) for part in zip(*rows, strict=True))
        return _numpy(losses), greedy.cpu().numpy()

    def state_arrays(self, state: ModelState) -> StateArrays:
        """The state as numpy arrays named ``tokens`` and ``layers.N.NAME``."""
        arrays: StateArrays = {"tokens": state.tokens.cpu().numpy()}
        for index, layer in enumerate(state.layers):
            for name, tensor in layer.items():
                exact = tensor.float() if tensor.is_floating_point() else tensor
                arrays[f"layers.{index}.{name}"] = exact.cpu().numpy()
        return arrays

    def state_from_arrays(self, arrays: StateArrays) -> ModelState:
        """The inverse of :meth:`state_arrays`."""
        dtype = self.model.model.embed_tokens.weight.dtype
        layers: list[dict[str, Tensor]] = [{} for _ in self.spec.layers]
        for key, array in arrays.items():
            if key == "tokens":
                continue
            _, index, name = key.split(".")
            tensor = torch.from_numpy(np.asarray(array)).to(self.device)
            if tensor.is_floating_point() and name != "state":
                tensor = tensor.to(dtype)
            layers[int(index)][name] = tensor
        tokens = torch.from_numpy(np.asarray(arrays["tokens"])).to(self.device)
        return ModelState(tokens, tuple(layers))

    def _ids(self, ids: Any) -> Tensor:
        return torch.from_numpy(np.asarray(ids).astype(np.int64)).to(self.device)


def load(path: Path, *, dtype: str | None = None) -> TorchBackend:
    """The model at ``path`` (any source), on the GPU if there is one."""
    return load_source(open_source(path), dtype=dtype)


def load_source(source: Source, *, dtype: str | None = None) -> TorchBackend:
    """The model of a source, as :func:`load`."""
    wanted = None if dtype is None else getattr(torch, dtype_named(dtype).name)
    model = build(source.spec, source.tensors, dtype=wanted)
    return TorchBackend(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def _pieces(length: int, form: Form) -> Iterator[slice]:
    """What each call computes: everything, two uneven pieces, or single tokens."""
    cuts = {0, length}
    if form == "recurrent":
        cuts |= {(length + 1) // 3}
    elif form == "step":
        cuts |= set(range(length))
    for start, end in pairwise(sorted(cuts)):
        yield slice(start, end)


def _scores(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses in nats of targets (T,) under logits (T, V), and where a target is the likeliest."""
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return losses, logits.argmax(dim=-1) == targets


def _numpy(x: Tensor) -> npt.NDArray[np.float32]:
    return x.float().cpu().numpy()
