"""The NumPy reference as a backend: slow, float64, and what all others are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from supra_core.model.layout import check_tensors
from supra_core.model.reference import ReferenceModel, SequenceState
from supra_core.model.spec import ModelSpec
from supra_core.runtime.backend import Form, Ids, Logits, Mask, StateArrays
from supra_core.sources.source import open_source
from supra_core.tensors import dtype_named

State = list[SequenceState]


class ReferenceBackend:
    """:class:`~supra_core.model.reference.ReferenceModel` with float32 logits."""

    name = "reference"

    def __init__(self, model: ReferenceModel) -> None:
        self._model = model
        self.spec: ModelSpec = model.spec

    def logits(self, ids: Ids, *, mask: Mask | None = None, form: Form = "parallel") -> Logits:
        """Logits (B, T, V), computed in float64 and rounded to float32."""
        return self._model.logits(ids, mask=mask, form=form).astype(np.float32)

    def prefill(
        self, ids: Ids, state: State | None = None, *, mask: Mask | None = None
    ) -> tuple[Logits, State]:
        """Logits (B, T, V) and the state after ids, going on from ``state``."""
        logits, after = self._model.prefill(ids, state, mask=mask)
        return logits.astype(np.float32), after

    def step(self, ids: Ids, state: State) -> tuple[Logits, State]:
        """Logits (B, V) and the state after one more token each, ids (B,)."""
        logits, after = self._model.step(ids, state)
        return logits.astype(np.float32), after

    def state_arrays(self, state: State) -> StateArrays:
        """``ROW.tokens`` and ``ROW.LAYER.NAME`` for each row of the batch."""
        arrays: StateArrays = {}
        for row, sequence in enumerate(state):
            arrays[f"{row}.tokens"] = np.array(sequence.tokens)
            for index, layer in enumerate(sequence.layers):
                arrays |= {f"{row}.{index}.{name}": array for name, array in layer.items()}
        return arrays

    def state_from_arrays(self, arrays: StateArrays) -> State:
        """The inverse of :meth:`state_arrays`."""
        rows = 1 + max(int(name.split(".")[0]) for name in arrays)
        return [self._sequence(arrays, row) for row in range(rows)]

    def _sequence(self, arrays: StateArrays, row: int) -> SequenceState:
        tokens = int(arrays[f"{row}.tokens"])
        layers: list[dict[str, Any]] = [{} for _ in self.spec.layers] if tokens else []
        for name, array in arrays.items():
            parts = name.split(".")
            if int(parts[0]) == row and len(parts) == 3:
                layers[int(parts[1])][parts[2]] = array
        return SequenceState(tokens, tuple(layers))


def load(path: str | Path, *, dtype: str | None = None) -> ReferenceBackend:
    """The model at ``path``. ``dtype`` rounds the weights; the arithmetic stays float64."""
    source = open_source(path)
    tensors = dict(source.tensors)
    check_tensors(source.spec, {name: t.shape for name, t in tensors.items()}, str(path))
    if dtype is not None:
        tensors = {name: t.astype(dtype_named(dtype)) for name, t in tensors.items()}
    return ReferenceBackend(ReferenceModel(source.spec, tensors))
