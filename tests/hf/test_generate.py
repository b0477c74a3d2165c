"""transformers' generate on our models: exact with its cache, in batches, turns and beams."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from supra_core.model.reference import ReferenceModel  # noqa: E402
from tests.hf.loading import load, write  # noqa: E402
from tests.tables import thinned  # noqa: E402
from tests.tiny_models import DISTINCT, SPECS, reference  # noqa: E402

# A padding token that is a word, too: only the mask may tell them apart.
PAD = 3
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": PAD}


@pytest.fixture(scope="module", params=thinned(SPECS, DISTINCT))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    spec = SPECS[request.param]
    folder = write(tmp_path_factory.mktemp("model") / request.param, spec)
    return load(folder), reference(spec)


def _prompts(model: ReferenceModel, *lengths: int) -> list[Any]:
    rng = np.random.default_rng(5)
    return [torch.from_numpy(rng.integers(0, model.spec.vocab_size, n))[None] for n in lengths]


def _padded(prompts: list[Any]) -> dict[str, Any]:
    """The prompts in one batch, padded on the left."""
    T = max(prompt.shape[1] for prompt in prompts)
    ids, mask = torch.full((len(prompts), T), PAD), torch.zeros(len(prompts), T, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, T - prompt.shape[1] :] = prompt[0]
        mask[row, T - prompt.shape[1] :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _continuation(model: Any, *prompts: Any) -> Any:
    """What follows the prompts; without a mask generate would take PAD for padding."""
    inputs = _padded(list(prompts))
    return model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]


def test_greedy(pair: Any) -> None:
    model, expected = pair
    prompt = _prompts(expected, 13)[0]
    logits, state = expected.prefill(prompt.numpy())
    said, last = [], logits[:, -1]
    for _ in range(GREEDY["max_new_tokens"]):
        said.append(int(last.argmax()))
        last, state = expected.step(np.array(said[-1:]), state)
    assert _continuation(model, prompt)[0].tolist() == said


def test_left_padding(pair: Any) -> None:
    """A padded row says what it says alone."""
    model, expected = pair
    prompts = _prompts(expected, 4, 90, 1, 37)
    together = _continuation(model, *prompts)
    for row, prompt in zip(together, prompts, strict=True):
        assert row.tolist() == _continuation(model, prompt)[0].tolist()


def test_turns(pair: Any) -> None:
    """The cache goes on over several calls, the whole text or its new part being given."""
    model, expected = pair
    prompts = _prompts(expected, 11, 26)
    text, cache = _padded(prompts), None
    for turn in range(3):
        found = model.generate(
            **text, past_key_values=cache, return_dict_in_generate=True, **GREEDY
        )
        fresh = model.generate(**text, **GREEDY)
        assert found.sequences.tolist() == fresh.tolist()
        cache = found.past_key_values
        # All but the token said last has been seen.
        assert cache.get_seq_length() == found.sequences.shape[1] - 1
        question = _padded(_prompts(expected, 5 + turn, 2))
        said = torch.ones_like(found.sequences[:, text["input_ids"].shape[1] :])
        text = {
            "input_ids": torch.cat([found.sequences, question["input_ids"]], dim=1),
            "attention_mask": torch.cat(
                [text["attention_mask"], said, question["attention_mask"]], dim=1
            ),
        }


def test_one_prompt_many_continuations(pair: Any) -> None:
    """A copied cache is independent; repeated, it serves a batch."""
    model, expected = pair
    prompt, *questions = _prompts(expected, 30, 4, 4)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    batch = copy.deepcopy(cache)
    for question in questions:
        text = _padded([torch.cat([prompt, question], dim=1)])
        found = model.generate(**text, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert found.tolist() == model.generate(**text, **GREEDY).tolist()
    batch.batch_repeat_interleave(3)
    batch.batch_select_indices(torch.tensor([2, 0]))
    text = _padded([torch.cat([prompt, question], dim=1) for question in questions])
    found = model.generate(**text, past_key_values=batch, **GREEDY)
    assert found.tolist() == model.generate(**text, **GREEDY).tolist()
    batch.reset()
    assert model.generate(**text, past_key_values=batch, **GREEDY).tolist() == found.tolist()


def test_beams(pair: Any) -> None:
    """The cache's rows follow the beams: as if every step saw all of the text again."""
    model, expected = pair
    inputs = _padded(_prompts(expected, 9, 21))
    settings = {**GREEDY, "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8}
    with_cache = model.generate(**inputs, **settings)
    assert with_cache.shape[0] == 4
    assert with_cache.tolist() == model.generate(**inputs, **settings, use_cache=False).tolist()


def test_sampling(pair: Any) -> None:
    model, expected = pair
    inputs = _padded(_prompts(expected, 9, 21))
    settings = {
        "do_sample": True, "num_return_sequences": 2, "temperature": 0.7, "top_p": 0.9,
        "max_new_tokens": 12, "pad_token_id": PAD,
    }  # fmt: skip
    said = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        said.append(model.generate(**inputs, **settings, use_cache=use_cache).tolist())
    assert said[0] == said[1]
    assert said[0][0] != said[0][1]


@pytest.mark.parametrize("name", ["paper", "windowed_sink", "sliding", "hybrid"])
def test_size_of_the_cache(name: str, tmp_path: Path) -> None:
    """It stays the same but for softmax layers without a window."""
    spec = SPECS[name]
    model = load(write(tmp_path / "model", spec))
    ids = torch.arange(300)[None] % spec.vocab_size
    kept = []
    for length in (100, 200, 300):
        cache = model(ids[:, :length], use_cache=True).past_key_values
        kept.append([
            sum(x.untyped_storage().nbytes() for x in layer.values()) for layer in cache.memory
        ])  # fmt: skip
    for layer, sizes in zip(spec.layers, zip(*kept, strict=True), strict=True):
        assert (len(set(sizes)) > 1) == (layer.mixer.layer_type == "full_attention")


def test_what_a_state_cannot_do_is_refused(tmp_path: Path) -> None:
    model = load(write(tmp_path / "model", SPECS["windowed"]))
    ids = torch.arange(12)[None]
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        model.generate(ids, assistant_model=copy.deepcopy(model), **GREEDY)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        model.generate(ids, prompt_lookup_num_tokens=2, **GREEDY)
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot forget its last tokens"):
        cache.crop(4)
    with pytest.raises(ValueError, match="is a DynamicCache, but a supra model goes on"):
        model(ids, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="holds 1 sequences, but 2 go on"):
        model(ids.repeat(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="linear attention makes no attention weights"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="attention_mask must have a column for each of 12"):
        model(ids, attention_mask=torch.ones(1, 1, 12, 12))
    packed = torch.cat([torch.arange(5), torch.arange(7)])[None]
    with pytest.raises(ValueError, match="position_ids differ from the tokens' places"):
        model(ids, position_ids=packed)
    places = torch.arange(12)[None]
    assert torch.equal(model(ids, position_ids=places).logits, model(ids).logits)


def test_embeddings_in_the_place_of_ids(pair: Any) -> None:
    model, expected = pair
    prompt = _prompts(expected, 13)[0]
    vectors = model.get_input_embeddings()(prompt).detach()
    found = model.generate(inputs_embeds=vectors, **GREEDY)
    assert found.tolist() == _continuation(model, prompt).tolist()
