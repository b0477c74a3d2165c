"""Calibrating a conversion: from a text and two models that are files, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from supra_core.errors import SupraError
from supra_core.model.layout import layer_prefix
from supra_core.model.spec import ModelSpec
from supra_core.progress import Progress, silent
from supra_core.sources.source import Source
from supra_core.tensors import LazyTensor, TensorSource
from supra_torch.calibration.calibrate import LayerFit, calibrate_layers
from supra_torch.model.model import SupraModel, build_layer, to_torch
from supra_torch.model.trunk import Layer
from supra_torch.precision import autocast, product_type, resolved_precision

DEFAULT_TOKENS = 16_384
_LENGTH = 512
# As many sequences as the regression is to be chosen on at least.
_FEWEST = 4
_SHORTEST = 32


@dataclass(frozen=True)
class TextCalibration:
    """A ``Calibration`` for ``convert``, on parts of a text.

    ``tokens``: of how many; they are spread evenly over the text.
    """

    text: str
    tokens: int = DEFAULT_TOKENS

    def __call__(
        self, teacher: Source, spec: ModelSpec, tensors: TensorSource, progress: Progress
    ) -> tuple[int, dict[str, LazyTensor]]:
        """The tokens used, and the mixers' new tensors."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        ids = self._sequences(teacher).to(device)
        precision = resolved_precision("auto", device)
        original = (teacher.spec, teacher.tensors)
        found, _ = calibrated_tensors(original, spec, tensors, ids, precision, progress=progress)
        return ids.numel(), found

    def _sequences(self, teacher: Source) -> Tensor:
        """Token ids (N, 512), spread over the text."""
        tokenizer = teacher.tokenizer()
        count = max(_FEWEST, self.tokens // _LENGTH)
        width = len(self.text) / count
        # Only what is used is tokenised; no tokenizer's tokens are longer on average.
        parts = [self.text[int(i * width) :][: min(int(width), 16 * _LENGTH)] for i in range(count)]
        begins = np.array(tokenizer.begins, dtype=np.int64)
        rows = [np.concatenate([begins, tokenizer.encode(part).ids])[:_LENGTH] for part in parts]
        length = min(len(row) for row in rows)
        if length < _SHORTEST:
            raise SupraError(
                f"the text to calibrate on has {len(self.text):,} characters, too few for {count} "
                f"sequences of {_SHORTEST} tokens: give a longer one, or --no-calibrate"
            )
        return torch.from_numpy(np.stack([row[:length] for row in rows]))


def calibrated_tensors(
    teacher: tuple[ModelSpec, TensorSource],
    spec: ModelSpec,
    tensors: TensorSource,
    ids: Tensor,
    precision: str,
    *,
    outputs: bool = True,
    progress: Progress = silent,
) -> tuple[dict[str, LazyTensor], list[LayerFit]]:
    """What :func:`supra_torch.calibration.calibrate.calibrate` on ids (N, T) changes, in float32.

    One layer of each model is in memory at a time, on the device of ids.
    """
    dtype = product_type(precision)
    found: dict[str, LazyTensor] = {}

    def pairs() -> Iterator[tuple[Layer, Layer]]:
        for index in range(spec.num_hidden_layers):
            theirs = build_layer(*teacher, index, dtype=dtype)
            ours = build_layer(spec, tensors, index, dtype=torch.float32)
            ours = ours.to(ids.device)
            before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
            yield ours, theirs.to(ids.device)
            for name, tensor in ours.state_dict().items():
                if not torch.equal(tensor, before[name]):
                    found[layer_prefix(index) + name] = LazyTensor.of(tensor.cpu().numpy())

    with autocast(ids.device, precision):
        embedding = _embedding(*teacher, dtype).to(ids.device)
        rotations = _rotations(spec).to(ids.device)
        layers = spec.num_hidden_layers
        fits = calibrate_layers(pairs(), layers, rotations, embedding, ids, outputs, progress)
    return found, fits


def _embedding(spec: ModelSpec, tensors: TensorSource, dtype: torch.dtype) -> SupraModel:
    """The model with nothing but what the first layer's input needs."""
    model = _bare(spec)
    names = ("model.embed_tokens.weight", "model.embed_norm.weight")
    weights = {n: to_torch(tensors[n]).to(dtype) for n in names if n in tensors}
    model.load_state_dict(weights, assign=True, strict=False)
    return model


def _rotations(spec: ModelSpec) -> SupraModel:
    """The model with nothing but its positions."""
    model = _bare(spec)
    model.model.embed_tokens = model.model.embed_norm = nn.Identity()  # type: ignore[assignment]
    return model


def _bare(spec: ModelSpec) -> SupraModel:
    """The model without layers, last norm and head; its embedding has no numbers yet."""
    with torch.device("meta"):
        model = SupraModel(spec)
    # Nothing may stay on the meta device, which has no numbers to move.
    model.model.layers = nn.ModuleList()
    model.model.norm = nn.Identity()  # type: ignore[assignment]
    model.lm_head = None
    return model
