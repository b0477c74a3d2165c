"""Rows computed in segments have the gradients of whole rows, in less memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from supra_torch.model.model import SupraModel, build  # noqa: E402
from supra_torch.recipes.config import UptrainConfig  # noqa: E402
from supra_torch.uptrain.run import uptrain  # noqa: E402
from supra_torch.uptrain.step.batches import Batch  # noqa: E402
from supra_torch.uptrain.step.stages import gradients  # noqa: E402
from tests.tables import thinned  # noqa: E402
from tests.tiny_models import DISTINCT, SPECS, lazy_weights  # noqa: E402
from tests.torch.uptraining import logged_losses  # noqa: E402

# As in test_packing: float32 norms between exact sums.
TOLERANCE = 2e-5


def _model(name: str) -> SupraModel:
    return build(SPECS[name], lazy_weights(SPECS[name]), dtype=torch.float64).double()


def _gradients(
    kind: Any, model: SupraModel, teacher: SupraModel, batch: Batch, segment: int
) -> tuple[float, dict[str, Any]]:
    model.zero_grad()
    loss = gradients(kind, model, teacher, batch, 0.5, segment)
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


# Documents that begin at a segment's first token, end in its middle, go through several; two rows.
BORDERS = torch.tensor([0, 7, 10, 11, 36, 61, 86, 120, 122, 122, 122], dtype=torch.int32)


@pytest.mark.parametrize(
    ("kind", "borders"),
    [
        ("transfer", BORDERS), ("uptrain", None),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("transfer", None), ("uptrain", BORDERS), ("distill", None),
                         ("distill", BORDERS))
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", thinned(SPECS, DISTINCT))
def test_gradients_are_those_of_whole_rows(name: str, kind: str, borders: Any) -> None:
    """Also where the last segment is shorter, or the first is inside the window."""
    model, teacher = _model(name), _model(name).requires_grad_(False)
    with torch.no_grad():
        for number, parameter in enumerate(teacher.parameters()):
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(number)
            )
    ids = torch.randint(0, 50, (2, 61), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, borders)
    loss, expected = _gradients(kind, model, teacher, batch, 0)
    for segment in (7, 25, 61, 100):
        found, ours = _gradients(kind, model, teacher, batch, segment)
        assert found == pytest.approx(loss, rel=1e-5)
        assert ours.keys() == expected.keys()
        for parameter, gradient in expected.items():
            scale = max(1e-3, float(gradient.abs().max()))
            assert (ours[parameter] - gradient).abs().max() <= 10 * TOLERANCE * scale, parameter


@pytest.mark.parametrize("part", ["activation checkpointing", "frozen projections"])
def test_what_else_a_stage_does_goes_with_it(part: str) -> None:
    model, teacher = _model("windowed_sink"), _model("windowed_sink").requires_grad_(False)
    model.activation_checkpointing = part == "activation checkpointing"
    if part == "frozen projections":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("log_" in name or "feature" in name)
    ids = torch.randint(0, 50, (1, 40), generator=torch.Generator().manual_seed(1))
    for kind in ("transfer", "uptrain"):
        _, expected = _gradients(kind, model, teacher, Batch(ids), 0)
        _, ours = _gradients(kind, model, teacher, Batch(ids), 16)
        assert ours.keys() == expected.keys() != set()
        for parameter, gradient in expected.items():
            scale = max(1e-3, float(gradient.abs().max()))
            assert (ours[parameter] - gradient).abs().max() <= 10 * TOLERANCE * scale, parameter


class _Held:
    """What graphs hold for their backward, in bytes; the most at any time."""

    now = most = 0

    def __init__(self, tensor: Any) -> None:
        self.tensor, self.bytes = tensor, tensor.untyped_storage().nbytes()
        _Held.now += self.bytes
        _Held.most = max(_Held.most, _Held.now)

    def __del__(self) -> None:
        _Held.now -= self.bytes


def _most_held(model: SupraModel, ids: Any, segment: int) -> int:
    _Held.now = _Held.most = 0
    hooks = torch.autograd.graph.saved_tensors_hooks(_Held, lambda held: held.tensor)
    with hooks:
        gradients("uptrain", model, None, Batch(ids), 1.0, segment)
    assert _Held.now == 0
    return _Held.most


def test_a_graph_is_that_of_one_segment() -> None:
    model = _model("windowed_sink")
    short, long = torch.zeros(1, 256, dtype=torch.long), torch.zeros(1, 1024, dtype=torch.long)
    assert _most_held(model, long, 0) > 3 * _most_held(model, short, 0)
    assert _most_held(model, long, 128) < 1.1 * _most_held(model, short, 128)


@pytest.mark.parametrize("packing", thinned(["apart", "joined"], ["apart"]))
def test_a_run_in_segments_is_the_run(
    settings: UptrainConfig, documents: Path, packing: str, tmp_path: Path
) -> None:
    changed = {"data": str(documents), "documents": packing, "tokens": 640}
    whole = settings.model_copy(update=changed)
    uptrain(whole, tmp_path / "whole")
    uptrain(whole.model_copy(update={"segment_tokens": 12}), tmp_path / "cut")
    ours, theirs = logged_losses(tmp_path / "cut"), logged_losses(tmp_path / "whole")
    # Each is a difference of logarithms of some units, in float32.
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-7)
