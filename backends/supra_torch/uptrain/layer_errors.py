"""How far each linear mixer is from the transformer's, on the transformer's own input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from supra_core.errors import SupraError
from supra_core.progress import Progress, silent
from supra_core.runtime.backend import Ids, check_ids
from supra_torch.model.model import SupraModel
from supra_torch.uptrain.step.batches import Batch
from supra_torch.uptrain.step.stages import is_converted, teacher_forced


@dataclass(frozen=True)
class LayerError:
    """``error``: squared difference of the outputs over the teacher's mean square."""

    layer: int
    error: float


@torch.inference_mode()
def layer_errors(
    student: SupraModel,
    teacher: SupraModel,
    ids: Ids,
    *,
    progress: Progress = silent,
    stage: str = "layer errors",
) -> list[LayerError]:
    """The error of every linear layer on ids (N, T), N >= 1, each fed the teacher's own input.

    It is what the stage ``transfer`` trains on (:func:`supra_torch.uptrain.step.stages.transfer`),
    with the means taken over all sequences: 0 is the transformer's output, 1 as far as an output
    of zeros. Both models are of one type. Raises :class:`SupraError` when they have different
    layers or widths, and for a token that they do not have.
    """
    _check(student, teacher)
    check_ids(ids, student.spec.vocab_size)
    device = next(teacher.parameters()).device
    difference = np.zeros(len(student.model.layers))
    scale = np.zeros(len(student.model.layers))
    for row in range(len(ids)):
        progress(stage, row, len(ids))
        tokens = torch.from_numpy(np.asarray(ids[row : row + 1], dtype=np.int64)).to(device)
        walk = teacher_forced(student, teacher, Batch(tokens))
        for index, (ours, x, target, positions) in enumerate(walk):
            if is_converted(ours):
                output, _ = ours.self_attn(x, positions, None, None)
                difference[index] += (output.float() - target.float()).square().mean().item()
            scale[index] += target.float().square().mean().item()
    progress(stage, len(ids), len(ids))
    return [
        LayerError(index, float(difference[index] / max(scale[index], 1e-12)))
        for index, layer in enumerate(student.spec.layers)
        if layer.mixer.converted
    ]


def _check(student: SupraModel, teacher: SupraModel) -> None:
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        if getattr(student.spec, name) != getattr(teacher.spec, name):
            raise SupraError(
                f"student and teacher have another {name}: name the transformer that the model "
                "was made from as teacher"
            )
