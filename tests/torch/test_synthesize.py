"""Sampling: the decoder's logits are the model's, draws have the right odds, batches repeat."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from supra_core.data.synthesis.rows import Kind, Vocabulary, vocabulary  # noqa: E402
from supra_core.text import ModelTokenizer  # noqa: E402
from supra_core.text.chat_template import ChatTemplate  # noqa: E402
from supra_torch.inference.lockstep import LockstepDecoder  # noqa: E402
from supra_torch.inference.synthesize import Draw, Synthesizer, draw_tokens  # noqa: E402
from supra_torch.model.model import SupraModel, build  # noqa: E402
from tests.tiny_chat import CHATML, SPECIAL, tokenizer  # noqa: E402
from tests.tiny_models import SPECS, lazy_weights  # noqa: E402

TURNS = ChatTemplate(CHATML, {}).turns()


def _model(name: str = "transformer") -> SupraModel:
    return build(SPECS[name], lazy_weights(SPECS[name])).eval()


def _words() -> Vocabulary:
    return vocabulary(ModelTokenizer(tokenizer()), 1, (2,), TURNS, "model")


def _synthesizer(seed: int = 0, length: int = 120, temperature: float = 1.0) -> Synthesizer:
    draw = Draw(temperature, 0.95, seed)
    return Synthesizer(_model(), _words(), draw, length=length, turns=TURNS, most_turns=2)


@pytest.mark.parametrize(
    "name",
    ["transformer", "sliding", "windowed", "hybrid", "paper_variant", "window", "window_hybrid"],
)
def test_the_decoders_logits_are_the_full_forwards(name: str) -> None:
    model, rng = _model(name), np.random.default_rng(0)
    prefix = torch.from_numpy(rng.integers(0, 50, 9))
    ids = torch.from_numpy(rng.integers(0, 50, (6, 40)))
    ids[:, :9] = prefix
    rows = torch.arange(6)
    decoder = LockstepDecoder(model, prefix, 6, 40)
    with torch.inference_mode():
        expected, _ = model(ids)
        for position in range(9, 40):
            found = decoder.logits
            torch.testing.assert_close(found, expected[rows, position - 1], rtol=2e-5, atol=2e-5)
            if position in (15, 30):
                kept = torch.tensor([0, 2, 3, 5] if position == 15 else [1, 3])
                decoder.keep(kept)
                rows = rows[kept]
            decoder.step(ids[rows, position])
        torch.testing.assert_close(decoder.logits, expected[rows, -1], rtol=2e-5, atol=2e-5)
        with pytest.raises(ValueError, match="room for 40"):
            decoder.step(ids[rows, 0])


def _odds(top_p: float, temperature: float, draws: int = 40_000) -> Any:
    """How often each token is drawn, where uniforms go through all shares evenly."""
    logits = torch.tensor([[0.0, 2.0, -1.0, 1.0, -torch.inf, 0.5]])
    uniforms = (np.arange(draws) + 0.5) / draws
    tokens = draw_tokens(logits.expand(draws, -1), uniforms, temperature, top_p)
    return logits[0], np.bincount(tokens.numpy(), minlength=6) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-9])
def test_draws_have_the_odds_of_the_nucleus(top_p: float, temperature: float) -> None:
    logits, found = _odds(top_p, temperature)
    expected = torch.softmax(logits.double() / temperature, 0).numpy()
    order = np.argsort(-expected)
    # The smallest set of the likeliest that has top_p of the probability.
    size = int(np.searchsorted(np.cumsum(expected[order]), top_p - 1e-12)) + 1
    expected[order[size:]] = 0
    np.testing.assert_allclose(found, expected / expected.sum(), atol=2e-4)


def test_the_largest_uniform_still_draws_a_possible_token() -> None:
    logits = torch.full((1, 50), -torch.inf)
    logits[0, 7] = 0.0
    for top_p in (0.9, 1.0):
        for uniform in (0.0, np.nextafter(1.0, 0.0)):
            assert draw_tokens(logits, np.array([uniform]), 1.0, top_p).tolist() == [7]


def test_a_nucleus_among_many_tokens_is_the_sorted_ones() -> None:
    rng = np.random.default_rng(3)
    logits, uniforms = torch.from_numpy(rng.normal(size=(200, 5000)) * 4).float(), rng.random(200)
    found = draw_tokens(logits, uniforms, 1.0, 0.9)
    for row, uniform, token in zip(logits.double(), uniforms, found.tolist(), strict=True):
        chances, order = torch.softmax(row, 0).sort(descending=True)
        before = chances.cumsum(0) - chances
        kept = chances[before < 0.9]
        place = int(torch.searchsorted(kept.cumsum(0), uniform * kept.sum(), right=True))
        assert token == int(order[place])


@pytest.mark.parametrize("kind", ["document", "conversation"])
def test_a_batch_repeats_and_depends_on_seed_and_number(kind: Kind) -> None:
    first = _synthesizer().batch(3, kind, 8)
    assert first == _synthesizer().batch(3, kind, 8)
    assert first != _synthesizer().batch(4, kind, 8)
    assert first != _synthesizer(seed=1).batch(3, kind, 8)
    assert len({sample.text for sample in first}) == 8


@pytest.mark.parametrize("kind", ["document", "conversation"])
def test_a_row_is_what_it_is_whatever_stands_beside_it(kind: Kind) -> None:
    many = _synthesizer().batch(0, kind, 12)
    # Rows that end early are dropped from the computation on the way.
    assert len({sample.sampled for sample in many}) > 6
    assert _synthesizer().batch(0, kind, 5) == many[:5]
    assert _synthesizer().batch(0, kind, 1) == many[:1]


def test_samples_hold_the_tokens_that_they_may() -> None:
    words, length = _words(), 120
    for kind in ("document", "conversation"):
        samples = _synthesizer(temperature=1.5).batch(0, kind, 24)
        assert any(sample.finished for sample in samples)
        for sample in samples:
            assert sample.text.count(SPECIAL[0]) == 1
            assert sample.text.endswith(SPECIAL[0])
            assert sample.tokens == len(words.encode(sample.text)) <= length + 2
            assert sample.kind == kind
        if kind == "document":
            assert not any(marker in sample.text for sample in samples for marker in SPECIAL[1:])
    assert SPECS["transformer"].vocab_size > words.size


def test_ids_that_are_no_tokens_are_never_drawn() -> None:
    words = _words()
    engine = _synthesizer()
    # The likeliest by far: special tokens that end nothing, and rows beyond the tokenizer's.
    logits = torch.zeros(500, 50)
    logits[:, [1, 3, *range(words.size, 50)]] = 50.0
    barred = engine._forbidden(words.ends)
    tokens = draw_tokens(logits + barred, np.linspace(0, 0.999, 500), 1.0, 1.0)
    assert set(tokens.tolist()) == set(range(words.size)) - {1, 3}


def test_a_cut_document_has_the_whole_length() -> None:
    samples = _synthesizer(length=30).batch(0, "document", 16)
    cut = [sample for sample in samples if not sample.finished]
    assert cut
    assert {sample.sampled for sample in cut} == {29}
