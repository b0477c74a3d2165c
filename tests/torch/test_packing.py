"""Packed documents: each computes what it computes alone, and no other has any part in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as settings_
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from supra_core.errors import SupraError  # noqa: E402
from supra_torch.model.model import SupraModel, build  # noqa: E402
from supra_torch.recipes.config import UptrainConfig  # noqa: E402
from supra_torch.uptrain.run import uptrain  # noqa: E402
from supra_torch.uptrain.step.batches import Batch  # noqa: E402
from supra_torch.uptrain.step.stages import next_token_loss  # noqa: E402
from tests.tables import thinned  # noqa: E402
from tests.tiny_models import DISTINCT, SPECS, lazy_weights  # noqa: E402
from tests.torch.uptraining import logged_losses  # noqa: E402

# Float32 norms between exact sums: some dozen roundings of 2^-24, of numbers that grow to tens.
TOLERANCE = 2e-5


def _model(name: str) -> SupraModel:
    return build(SPECS[name], lazy_weights(SPECS[name]), dtype=torch.float64).double()


def _ids(*shape: int, seed: int = 0) -> Any:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


def _borders(lengths: list[int], empty: int = 0) -> Any:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return torch.cat([ends, ends[-1:].expand(empty)]).int()


def _gradients(model: SupraModel, hidden: Any) -> dict[str, Any]:
    """Of one fixed function of the hidden states."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype)
    (hidden * weights).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", thinned(SPECS, DISTINCT))
@settings_(max_examples=settings_.default.max_examples // 5)
@given(
    first=st.lists(st.integers(1, 90), min_size=1, max_size=4),
    rest=st.integers(1, 40),
    seed=st.integers(0, 100),
)
def test_a_document_computes_what_it_does_alone(
    name: str, first: list[int], rest: int, seed: int
) -> None:
    """Two rows: some documents, and the same ones in another order."""
    model = _model(name)
    lengths = [*first, rest]
    T = sum(lengths)
    ids = _ids(2, T, seed=seed)
    both = [*lengths, *reversed(lengths)]
    packed, _ = model.hidden(ids, remember=False, cu_seqlens=_borders(both, empty=2))
    alone = [model.hidden(row[None])[0][0] for row in ids.flatten().split(both)]
    expected = torch.cat(alone).view(2, T, -1)
    assert (packed - expected).abs().max() <= TOLERANCE * expected.abs().max()
    ours, theirs = _gradients(model, packed), _gradients(model, expected)
    assert ours.keys() == theirs.keys()
    for parameter, gradient in theirs.items():
        scale = max(1.0, float(gradient.abs().max()))
        assert (ours[parameter] - gradient).abs().max() <= 10 * TOLERANCE * scale, parameter


@pytest.mark.parametrize("name", SPECS)
def test_nothing_leaks_to_the_last_bit(name: str) -> None:
    """Other text in one document changes no bit of another, nor does a gradient come back."""
    model = _model(name)
    borders = _borders([37, 70, 23, 130])
    ids = _ids(2, 130)
    other = ids.clone()
    other[0, 37:107] = _ids(70, seed=1)
    h, changed = (model.hidden(x, remember=False, cu_seqlens=borders)[0] for x in (ids, other))
    kept = torch.ones(2, 130, dtype=torch.bool)
    kept[0, 37:107] = False
    assert torch.equal(h[kept], changed[kept])
    assert not torch.equal(h[~kept], changed[~kept])

    embedded = model.embed(ids).detach().requires_grad_()
    positions = model.positions(ids, cu_seqlens=borders)
    out = embedded
    for layer in model.model.layers:
        out, _ = layer(out, positions, None, None, False)
    out[~kept].square().sum().backward()
    assert (embedded.grad[kept] == 0).all()
    assert (embedded.grad[~kept] != 0).any()


def test_a_document_never_predicts_the_next_one() -> None:
    """The loss of packed rows is that of the documents alone, none of which counts twice."""
    model, lengths = _model("windowed_sink"), [37, 1, 22, 40, 20]
    ids = _ids(2, 60)
    packed = next_token_loss(model, Batch(ids, _borders(lengths, empty=3)))
    alone = torch.zeros((), dtype=torch.float64)
    for document in ids.flatten().split(lengths):
        if len(document) > 1:
            loss = next_token_loss(model, Batch(document[None])).double()
            alone += loss * (len(document) - 1)
    # Each row has 59 tokens that may follow another.
    torch.testing.assert_close(packed.double(), alone / (2 * 59), rtol=1e-5, atol=0)
    joined = next_token_loss(model, Batch(ids)).double()
    assert abs(joined - packed) > 1e-3


def test_a_run_keeps_documents_apart_unless_told(
    settings: UptrainConfig, documents: Path, tmp_path: Path
) -> None:
    config = settings.model_copy(update={"data": str(documents), "tokens": 256})
    apart = uptrain(config, tmp_path / "apart")
    joined = uptrain(config.model_copy(update={"documents": "joined"}), tmp_path / "joined")
    assert apart["held_out_perplexity"] != joined["held_out_perplexity"]
    assert logged_losses(tmp_path / "apart") != logged_losses(tmp_path / "joined")


def test_a_run_from_before_documents_were_kept_apart_is_named(
    settings: UptrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    uptrain(settings.model_copy(update={"tokens": 128}), run)
    record = json.loads((run / "run.json").read_text())
    del record["config"]["documents"]
    (run / "run.json").write_text(json.dumps(record))
    with pytest.raises(SupraError, match="documents was joined and is apart now"):
        uptrain(settings.model_copy(update={"tokens": 128}), run)


def test_packed_documents_take_no_state() -> None:
    model = _model("windowed")
    _, state = model.hidden(_ids(1, 8))
    with pytest.raises(ValueError, match="no state and no mask"):
        model.hidden(_ids(1, 8), state, cu_seqlens=_borders([8]))
