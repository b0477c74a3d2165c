"""The error of each layer, against the definition and the stage that trains on it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from supra_core.conversion.linearize import LinearizeOptions, linearize
from supra_core.errors import SupraError
from tests.tiny_models import SPECS, lazy_weights

torch = pytest.importorskip("torch")

from supra_torch.model.model import SupraModel, build  # noqa: E402
from supra_torch.uptrain.layer_errors import layer_errors  # noqa: E402
from supra_torch.uptrain.step.batches import Batch  # noqa: E402
from supra_torch.uptrain.step.stages import transfer  # noqa: E402

IDS = np.random.default_rng(2).integers(50, size=(3, 40))


def _pair(*kept: int) -> tuple[SupraModel, SupraModel]:
    spec = SPECS["transformer"]
    weights = lazy_weights(spec)
    linear = linearize(spec, weights, LinearizeOptions("pure", keep_softmax=kept))
    return build(*linear), build(spec, weights)


def test_it_is_what_transfer_trains_on() -> None:
    student, teacher = _pair()
    found = layer_errors(student, teacher, IDS[:1])
    assert [one.layer for one in found] == [0, 1]
    loss = transfer(student, teacher, Batch(torch.from_numpy(IDS[:1]))).item()
    assert np.mean([one.error for one in found]) == pytest.approx(loss, rel=1e-5)
    assert found[0].error > 1e-3


def test_sequences_are_weighed_together() -> None:
    student, teacher = _pair()
    together = layer_errors(student, teacher, IDS)[0].error
    single = [layer_errors(student, teacher, IDS[row : row + 1])[0].error for row in range(3)]
    assert min(single) < together < max(single)


def test_the_teacher_itself_and_an_output_of_zeros() -> None:
    student, teacher = _pair(0)
    assert [one.layer for one in layer_errors(student, teacher, IDS)] == [1]
    with torch.no_grad():
        student.model.layers[1].self_attn.o_proj.weight.zero_()
        student.model.layers[1].self_attn.o_proj.bias.zero_()
    assert layer_errors(student, teacher, IDS)[0].error == pytest.approx(1.0, rel=1e-5)
    assert layer_errors(teacher, teacher, IDS) == []


def test_a_token_beyond_the_vocabulary_is_refused() -> None:
    student, teacher = _pair()
    with pytest.raises(SupraError, match="token id 50 is outside"):
        layer_errors(student, teacher, np.array([[1, 50]]))


def test_another_transformer_is_refused() -> None:
    student, _ = _pair()
    other = replace(SPECS["transformer"], vocab_size=60)
    with pytest.raises(SupraError, match="another vocab_size"):
        layer_errors(student, build(other, lazy_weights(other)), IDS)
