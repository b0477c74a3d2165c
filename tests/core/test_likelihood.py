"""Log-probabilities against their definition, and tokens' places in their text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from supra_core.runtime.backend import load
from supra_core.runtime.backend_engine import BackendEngine
from supra_core.runtime.likelihood import Likelihood, likelihood, likelihoods
from supra_core.runtime.sampling import Sampling
from supra_core.runtime.token_texts import Places, decode_within
from supra_core.text import ModelTokenizer
from tests.tiny_chat import tokenizer, write_model


@pytest.mark.parametrize("top", [0, 1, 3, 7, 20])
def test_by_the_definition(top: int) -> None:
    logits = np.random.default_rng(top).normal(0, 8, (5, 7)).astype(np.float32)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    for found, row, token in zip(likelihoods(logits, range(5), top), exact, range(5), strict=True):
        assert found.token == token
        assert found.logprob == pytest.approx(row[token], abs=1e-5)
        order = np.argsort(-row)[:top]
        assert [index for index, _ in found.top] == order.tolist()
        assert [value for _, value in found.top] == pytest.approx(row[order], abs=1e-5)


def test_the_likeliest_is_as_likely_as_the_first_of_the_top() -> None:
    logits = np.array([0.1, 3.3, 3.3, -1e4], dtype=np.float32)
    found = likelihood(logits, 1, 2)
    assert found.top[0] == (1, found.logprob) and found.top[1] == (2, found.logprob)
    assert likelihood(logits, 3, 1).logprob < -1e3
    assert Likelihood(3, None).top == ()


def test_tokens_share_a_character() -> None:
    # As of a byte-level tokenizer: 1 and 2 are halves of one character, 3 is never whole.
    texts = {(0,): "ab", (1,): "\ufffd", (1, 2): "é", (4,): "c", (3,): "\ufffd"}
    places = Places(lambda ids: texts[tuple(ids)], 10)
    assert [places.take(token) for token in (0, 1, 2, 4, 3)] == [10, 12, 12, 13, 14]
    assert places.text == "abéc" and places.rest() == "abéc\ufffd"


def test_the_space_before_a_word_stays() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE({"<s>": 0, "▁": 1, "a": 2, "▁a": 3}, [("▁", "a")])
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.add_special_tokens(["<s>"])
    assert decode_within(made, [3]) == " a" and made.decode([3]) == "a"
    assert decode_within(made, [0, 2]) == "<s>a"


def test_in_turns(tmp_path: Path) -> None:
    """In several pieces as at once; the token that ends a sequence, which is not said, as well."""
    pytest.importorskip("tokenizers")
    model = load("reference", write_model(tmp_path / "model"))
    engine = BackendEngine(model, ModelTokenizer(tokenizer()))
    ids = engine.encode("a quiet harbour in winter. " * 6)
    following = [*ids[1:], 7]
    whole = model.logits(np.array([ids]))[0]
    for one, other in zip(
        engine.score(ids, following, engine.fresh(), 2),
        likelihoods(whole, following, 2),
        strict=True,
    ):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [index for index, _ in one.top] == [index for index, _ in other.top]
    end = int(whole[-1].argmax())
    model.spec = replace(model.spec, eos_token_id=(end,))
    batch = engine.batch(2)
    batch.add(ids, engine.fresh(), Sampling(max_tokens=4), top=1)
    (spoken,) = batch.step()
    assert (spoken.token, spoken.finish) == (None, "stop")
    assert spoken.likelihood is not None and spoken.likelihood.token == end
    assert spoken.likelihood.top == ((end, spoken.likelihood.logprob),)
    batch.add(ids, engine.fresh(), Sampling(max_tokens=4))
    assert batch.step()[0].likelihood is None
