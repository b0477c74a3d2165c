"""What the lm-eval harness is given, as far as it can be told without the harness."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from supra_core.errors import SupraError
from supra_core.measure.scoring import Pair
from supra_core.runtime.sampling import Sampling
from supra_core.text import ModelTokenizer
from tests.tiny_tokenizers import byte_level, with_bos

pytest.importorskip("torch")

from supra_torch.inference.lm_eval import _encoded, _failure, _generate, _metrics, _pair, _sampling  # noqa: E402

BOS = "<|endoftext|>"


class Even:
    """A backend for which all tokens are as likely; it keeps the prompts that it was given."""

    name = "even"

    def __init__(self, vocabulary: int) -> None:
        self.spec = SimpleNamespace(
            vocab_size=vocabulary, eos_token_id=(), max_position_embeddings=64
        )
        self.prompts: list[list[int]] = []

    def prefill(self, ids: Any, state: Any = None, *, mask: Any = None) -> Any:
        self.prompts.append(ids[0].tolist())
        return np.zeros((*ids.shape, self.spec.vocab_size), np.float32), None

    def step(self, ids: Any, state: Any) -> Any:
        return np.zeros((len(ids), self.spec.vocab_size), np.float32), None


def test_a_context_without_a_token_is_the_prefix() -> None:
    assert _pair([], [4, 5], 7) == Pair((7,), (4, 5))
    assert _pair([3], [4, 5], 7) == Pair((3,), (4, 5))


def test_texts_begin_as_the_tokenizer_begins_them() -> None:
    tokenizer = ModelTokenizer(with_bos(byte_level(), BOS))
    plain = tokenizer.encode("ab").ids.tolist()
    bos = tokenizer.raw.token_to_id(BOS)
    assert _encoded(tokenizer, "ab", None) == _encoded(tokenizer, "ab", True) == [bos, *plain]
    assert _encoded(tokenizer, "ab", False) == plain
    assert _encoded(tokenizer, BOS + "ab", None) == [bos, *plain]
    model = Even(tokenizer.raw.get_vocab_size())
    _generate(model, tokenizer, "ab", {"max_gen_toks": 2}, seed=0)  # type: ignore[arg-type]
    assert model.prompts == [[bos, *plain]]


def test_errors_of_filtered_metrics_end_as_all_do() -> None:
    found = _metrics(
        {
            "alias": "gsm8k", "acc,none": 0.25, "acc_stderr,none": 0.5,
            "exact_match,strict-match": 0.75, "exact_match_stderr,strict-match": 1,
            "word_perplexity,none": 2.0, "word_perplexity_stderr,none": "N/A",
        }
    )  # fmt: skip
    assert found == {
        "acc": 0.25, "acc_stderr": 0.5, "exact_match,strict-match": 0.75,
        "exact_match,strict-match_stderr": 1.0, "word_perplexity": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({}, Sampling(seed=3)),
        ({"until": ["a"], "num_beams": 1, "max_new_tokens": 7}, Sampling(max_tokens=7, seed=3)),
        ({"max_tokens": 7, "max_gen_toks": 5}, Sampling(max_tokens=5, seed=3)),
        ({"temperature": 0.2, "top_p": 0.95}, Sampling(0.2, top_p=0.95, seed=3)),
        ({"do_sample": True, "temperature": 1}, Sampling(1.0, seed=3)),
        ({"do_sample": False, "temperature": 0.8, "top_p": 0.5}, Sampling(seed=3)),
    ],
)
def test_generation_is_what_the_task_asks_for(given: dict[str, Any], sampling: Sampling) -> None:
    assert _sampling(given, 3) == sampling


@pytest.mark.parametrize("given", [{"num_beams": 4}, {"typical_p": 0.9}, {"do_sample": True}])
def test_generation_that_we_have_not_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(SupraError, match="generation_kwargs asks for"):
        _sampling(given, 0)


def test_repeats_are_other_samples() -> None:
    tokenizer = ModelTokenizer(byte_level())
    model: Any = Even(tokenizer.raw.get_vocab_size())
    given = {"temperature": 1.0, "max_gen_toks": 20}
    texts = [_generate(model, tokenizer, "ab", given, seed=seed) for seed in (0, 1, 0)]
    assert texts[0] == texts[2] != texts[1]


def test_only_what_was_not_fetched_says_to_go_online() -> None:
    assert "go online" in str(_failure(["t"], ConnectionError("no route")))
    said = str(_failure(["t"], ValueError("no split test\nat all")))
    assert "no split test" in said and "online" not in said and "at all" not in said
