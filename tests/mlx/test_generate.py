"""Generation against a plain greedy loop."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx_lm.generate import batch_generate  # noqa: E402
from mlx_lm.sample_utils import make_sampler  # noqa: E402
from mlx_lm.tokenizer_utils import TokenizerWrapper  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from supra_core.errors import FormatError, SupraError  # noqa: E402
from supra_core.runtime.sampling import Sampling, sample  # noqa: E402
from supra_mlx.backend import MLXBackend, load  # noqa: E402
from supra_mlx.engine import MLXEngine  # noqa: E402
from supra_mlx.generate import stream  # noqa: E402
from tests.mlx.chat import (  # noqa: E402
    END_OF_TURN,
    load_model,  # noqa: E402
    write_chat_model,
)
from tests.mlx.models import SPECS  # noqa: E402
from tests.tiny_tokenizers import byte_level, sentencepiece  # noqa: E402

NAMES = ("paper", "windowed", "hybrid")
PROMPT = list(range(5, 40))


@pytest.fixture(scope="module", params=NAMES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Model and tokenizer from an artifact on disk."""
    folder = tmp_path_factory.mktemp("models") / request.param
    return load_model(write_chat_model(folder, SPECS[request.param]))


def _greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, up to and including the end of the turn."""
    backend = MLXBackend(model)
    logits, state = backend.prefill(np.array([prompt]))
    last, tokens = logits[:, -1], []
    while len(tokens) < count and END_OF_TURN not in tokens:
        tokens.append(int(last[0].argmax()))
        last, state = backend.step(np.array(tokens[-1:]), state)
    return tokens


def _text(tokenizer: Any, tokens: list[int]) -> str:
    """What is said: everything before the end of the turn."""
    return str(tokenizer.decode(tokens[: -1 if tokens[-1] == END_OF_TURN else None]))


def test_greedy_is_the_argmax_loop(loaded: Any) -> None:
    model, tokenizer = loaded
    said = list(stream(model, PROMPT, Sampling(max_tokens=40)))
    assert said == _greedy(model, PROMPT, 40)


def test_the_cache_holds_every_token_yielded(loaded: Any) -> None:
    model, tokenizer = loaded
    cache = model.make_cache()
    said = stream(model, PROMPT, Sampling(max_tokens=9), cache=cache)
    tokens = [next(said) for _ in range(5)]
    assert tokens == _greedy(model, PROMPT, 5)
    following = list(stream(model, [7, 8], Sampling(max_tokens=5), cache=cache))
    assert following == _greedy(model, [*PROMPT, *tokens, 7, 8], 5)


def test_it_stops_at_the_end_of_text(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded
    likely = _greedy(model, PROMPT, 6)
    spec = replace(model.spec, eos_token_id=(likely[3],))
    monkeypatch.setattr(type(model), "spec", spec)
    tokens = list(stream(model, PROMPT, Sampling(max_tokens=40)))
    assert tokens == likely[: likely.index(likely[3]) + 1]


def test_a_seed_repeats_and_penalties_apply(loaded: Any) -> None:
    model, tokenizer = loaded

    def sample(**settings: Any) -> list[int]:
        sampling = Sampling(max_tokens=20, **settings)
        return list(stream(model, PROMPT, sampling))

    chosen = {"temperature": 1.0, "top_p": 0.95, "min_p": 0.01}
    assert sample(seed=3, **chosen) == sample(seed=3, **chosen) != sample(seed=4, **chosen)
    penalised = sample(repetition_penalty=5.0)
    assert len(set(penalised)) > len(set(sample()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0, or from 0.001"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"min_p": 2.0}, "min_p must be from 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be from 0.01"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SupraError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("tokenizer", [sentencepiece(), byte_level()])
def test_ids_beyond_the_tokenizer_have_no_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A vocabulary that is padded, as Llama's and Mistral's children have it."""
    folder = write_chat_model(
        tmp_path / "model", SPECS["windowed"], tokenizer=tokenizer, padding=2000
    )
    engine = MLXEngine(*load_model(folder))
    sampling = Sampling(1.0, max_tokens=60, seed=3)
    said = list(engine.generate(PROMPT, engine.fresh(), sampling, continues=True))
    beyond = [text for token, text in said if token >= tokenizer.get_vocab_size()]
    assert beyond and not any(beyond)
    assert any(text for _, text in said)


def test_an_empty_prompt(loaded: Any) -> None:
    with pytest.raises(SupraError, match="prompt is empty"):
        stream(loaded[0], [], Sampling())


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model", SPECS["paper"])
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match="has no tokenizer: give token ids, or copy"):
        load_model(folder)
    assert load(folder).name == "mlx"
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(FormatError, match="tokenizer.json cannot be used"):
        load_model(folder)


def test_what_the_tokenizer_names_of_another_mlx_lm(tmp_path: Path) -> None:
    """A tool parser and a chat template that the installed one has not: neither is used."""
    folder = write_chat_model(tmp_path / "model", SPECS["paper"])
    path, question = folder / "tokenizer_config.json", [{"role": "user", "content": "Hello"}]
    expected = MLXEngine(*load_model(folder)).render(question)
    unknown = dict.fromkeys(("tool_parser_type", "chat_template_type"), "of_tomorrow")
    path.write_text(json.dumps(json.loads(path.read_text()) | unknown))
    assert MLXEngine(*load_model(folder)).render(question) == expected


def test_mlx_lms_batch_generator(loaded: Any) -> None:
    """Prompts of unequal lengths, padded by mlx-lm inside its own caches."""
    model, tokenizer = loaded
    prompts = [PROMPT[:30], PROMPT[:7], PROMPT[10:]]
    stock = TokenizerWrapper(PreTrainedTokenizerFast(tokenizer_object=tokenizer.raw))
    texts = batch_generate(model, stock, prompts, max_tokens=12).texts
    assert texts == [_text(tokenizer, _greedy(model, prompt, 12)) for prompt in prompts]


@pytest.mark.parametrize("settings", [{"min_p": 0.1}, {"top_p": 0.8}, {"top_p": 0.7, "min_p": 0.3}])
def test_both_samplers_keep_the_same_tokens(settings: dict[str, float]) -> None:
    """mlx-lm's and ours, from the same logits at a temperature that makes all of them likely."""
    logits = np.arange(3.0, -3.0, -1.0, dtype=np.float32)
    generator = np.random.default_rng(0)
    sampling = Sampling(temperature=5.0, **settings)
    ours = {sample(logits, sampling, generator) for _ in range(300)}
    theirs = make_sampler(temp=5.0, **settings)
    normal = mx.array(logits - np.log(np.exp(logits).sum()))[None]
    assert ours == {int(theirs(normal).item()) for _ in range(300)}
