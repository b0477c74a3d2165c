"""Sequences spoken together against the same ones alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

mx = pytest.importorskip("mlx.core")

from mlx.utils import tree_map  # noqa: E402
from mlx_lm.models.base import create_ssm_mask  # noqa: E402

from supra_core.errors import SupraError  # noqa: E402
from supra_core.runtime.likelihood import likelihood  # noqa: E402
from supra_core.runtime.sampling import Sampling  # noqa: E402
from supra_mlx.engine import MLXEngine  # noqa: E402
from supra_mlx.mixers import base  # noqa: E402
from tests.mlx.chat import load_model, write_chat_model  # noqa: E402
from tests.mlx.models import SPECS  # noqa: E402

PROMPTS = [list(range(5, 5 + length)) for length in (1, 2, 7, 19, 33)]


@pytest.fixture(scope="module", params=["paper", "windowed", "hybrid"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MLXEngine:
    folder = tmp_path_factory.mktemp("models") / request.param
    return MLXEngine(*load_model(write_chat_model(folder, SPECS[request.param])))


def alone(engine: MLXEngine, prompt: list[int], sampling: Sampling) -> list[int]:
    return [token for token, _ in engine.generate(prompt, engine.fresh(), sampling)]


def begun(engine: MLXEngine, prompt: list[int]) -> Any:
    """The state before the prompt's last token."""
    state = engine.fresh()
    engine.feed(prompt[:-1], state, lambda *_, **__: None)
    return state


def finished(batch: Any, keys: list[int], said: dict[int, list[int]]) -> dict[int, Any]:
    """Steps until the sequences have ended; why each did."""
    ends: dict[int, Any] = {}
    while len(ends) < len(keys):
        for spoken in batch.step():
            said.setdefault(spoken.key, []).append(spoken.token)
            if spoken.finish:
                ends[spoken.key] = spoken.finish
    return ends


def test_together_as_alone_coming_and_going(engine: MLXEngine) -> None:
    batch = engine.batch(8)
    samplings = [Sampling(max_tokens=4 + 3 * i) for i in range(len(PROMPTS))]
    said: dict[int, list[int]] = {}
    keys = []
    for prompt, sampling in zip(PROMPTS, samplings, strict=True):
        keys.append(batch.add(prompt[-1:], begun(engine, prompt), sampling, prompt[:-1]))
        for spoken in batch.step():
            said.setdefault(spoken.key, []).append(spoken.token)
    # One leaves in the middle, with a state that knows what it said.
    left = keys.pop(3)
    state, before = batch.take(left), said[left]
    finished(batch, [key for key in keys if len(said.get(key, ())) < samplings[key].max_tokens],
             said)  # fmt: skip
    for key in keys:
        assert said[key] == alone(engine, PROMPTS[key], samplings[key])
    prompt = [*PROMPTS[3], *before, 9]
    following = [token for token, _ in engine.generate([9], state, Sampling(max_tokens=5))]
    assert following == alone(engine, prompt, Sampling(max_tokens=5))
    with pytest.raises(KeyError):
        batch.take(left)


def test_the_state_at_the_end(engine: MLXEngine) -> None:
    batch, said = engine.batch(2), {}
    key = batch.add(PROMPTS[2], engine.fresh(), Sampling(max_tokens=6))
    assert finished(batch, [key], said) == {key: "length"}
    state = batch.take(key)
    following = [token for token, _ in engine.generate([9], state, Sampling(max_tokens=5))]
    expected = alone(engine, [*PROMPTS[2], *said[key], 9], Sampling(max_tokens=5))
    assert following == expected
    # The batch is empty now and takes up new ones.
    again = batch.add(PROMPTS[3], engine.fresh(), Sampling(max_tokens=6))
    finished(batch, [again], said)
    assert said[again] == alone(engine, PROMPTS[3], Sampling(max_tokens=6))


def test_the_state_given_stays_as_it_was(engine: MLXEngine) -> None:
    state = begun(engine, PROMPTS[4])
    arrays = {name: array.copy() for name, array in engine.arrays(state).items()}
    batch, said = engine.batch(4), {}
    keys = [batch.add(PROMPTS[4][-1:], state, Sampling(max_tokens=5)) for _ in range(3)]
    finished(batch, keys, said)
    assert said[keys[0]] == said[keys[1]] == said[keys[2]]
    after = engine.arrays(state)
    assert arrays.keys() == after.keys()
    assert all((arrays[name] == after[name]).all() for name in arrays)


def test_a_fresh_state_costs_the_others_no_padding(
    engine: MLXEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that looks for padding takes twice as long, for all and to the end."""
    masks = []

    def noted(*arguments: Any) -> Any:
        masks.append(create_ssm_mask(*arguments))
        return masks[-1]

    monkeypatch.setattr(base, "create_ssm_mask", noted)
    batch, said = engine.batch(4), {}
    sampling = Sampling(max_tokens=6)
    keys = [batch.add(PROMPTS[2][-1:], begun(engine, PROMPTS[2]), sampling)]
    batch.step()
    keys += [batch.add([token], engine.fresh(), sampling) for token in (5, 6)]
    finished(batch, keys, said)
    assert len(masks) > 6 and all(mask is None for mask in masks)
    for key, token in zip(keys[1:], (5, 6), strict=True):
        assert said[key] == alone(engine, [token], sampling)


def test_each_has_its_own_sampling(engine: MLXEngine) -> None:
    samplings = [
        Sampling(1.0, 1.0, 9, 3),
        Sampling(0.7, 0.9, 9, 4),
        Sampling(1.0, 1.0, 9, 5, 0.02),
        Sampling(max_tokens=9, repetition_penalty=1.5),
        Sampling(1.0, 1.0, 9, 3, repetition_penalty=1.2),
    ]
    batch, said = engine.batch(8), {}
    keys = [
        batch.add(prompt, engine.fresh(), sampling)
        for prompt, sampling in zip(PROMPTS, samplings, strict=True)
    ]
    finished(batch, keys, said)
    for key, prompt, sampling in zip(keys, PROMPTS, samplings, strict=True):
        assert said[key] == alone(engine, prompt, sampling)


def test_a_penalty_knows_what_was_fed_before(engine: MLXEngine) -> None:
    sampling = Sampling(max_tokens=9, repetition_penalty=1.5)
    batch, said = engine.batch(8), {}
    prompt = PROMPTS[4]
    key = batch.add(prompt[-1:], begun(engine, prompt), sampling, prompt[:-1])
    finished(batch, [key], said)
    assert said[key] == alone(engine, prompt, sampling)


def test_how_likely_its_tokens_were(engine: MLXEngine) -> None:
    """In a batch, alone, and by a pass over them; of the sequence that asks, and no other."""
    prompt, sampling = PROMPTS[3], Sampling(max_tokens=6)
    batch = engine.batch(4)
    asking = batch.add(prompt, engine.fresh(), sampling, top=3)
    batch.add(PROMPTS[2], engine.fresh(), Sampling(max_tokens=8))
    told, others = [], []
    while len(told) < 6:
        for spoken in batch.step():
            (told if spoken.key == asking else others).append(spoken.likelihood)
    batch.close()
    assert others and not any(others)
    heard: list[Any] = []
    said = [
        token
        for token, _ in engine.generate(
            prompt, engine.fresh(), sampling,
            on_token=lambda logits, token: heard.append(likelihood(logits, token, 3)),
        )
    ]  # fmt: skip
    ids = [*prompt, *said]
    # In several parts, as a long one is read.
    state = engine.fresh()
    followed = engine.score(ids[:9], ids[1:10], state, 3)
    followed += engine.score(ids[9:-1], ids[10:], state, 3)
    for found in (told, heard):
        for one, other in zip(found, followed[-6:], strict=True):
            assert one.token == other.token
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [index for index, _ in one.top] == [index for index, _ in other.top]
            # Greedy: what was said is the likeliest.
            assert one.top[0] == (one.token, one.logprob)


def test_nothing_to_go_on_from(engine: MLXEngine) -> None:
    with pytest.raises(SupraError, match="empty"):
        engine.batch(1).add([], engine.fresh(), Sampling())


def test_it_ends_at_the_end_of_a_turn(engine: MLXEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    likely = alone(engine, PROMPTS[3], Sampling(max_tokens=6))
    spec = replace(engine.model.spec, eos_token_id=(likely[3],))
    monkeypatch.setattr(type(engine.model), "spec", spec)
    batch, said = engine.batch(2), {}
    key = batch.add(PROMPTS[3], engine.fresh(), Sampling(max_tokens=40))
    assert finished(batch, [key], said) == {key: "stop"}
    assert said[key] == likely[: likely.index(likely[3]) + 1]


@pytest.mark.parametrize("ended", [True, False])
def test_a_state_taken_holds_nothing_of_the_others(tmp_path: Path, ended: bool) -> None:
    """mlx-lm's share the batch's arrays: five times the memory that these are worth."""
    spec = replace(SPECS["hybrid"], head_dim=64, value_head_dim=64)
    engine = MLXEngine(*load_model(write_chat_model(tmp_path / "model", spec)))
    begun(engine, PROMPTS[3])  # What is made once, as compiled functions, does not count.
    before = mx.get_active_memory()
    batch, sampling = engine.batch(16), Sampling(max_tokens=3)
    keys = [batch.add([5], begun(engine, PROMPTS[3]), sampling) for _ in range(16)]
    if ended:
        finished(batch, keys, {})
    else:
        while len(batch.step()) < len(keys):
            pass
    kept = [batch.take(key) for key in keys]
    batch.close()
    del batch
    worth = sum(cache.nbytes for state in kept for cache in state)
    assert worth <= mx.get_active_memory() - before < 1.5 * worth


def without_numbers(leaf: Any) -> Any:
    is_other = not isinstance(leaf, mx.array) or not mx.issubdtype(leaf.dtype, mx.floating)
    return leaf if is_other else leaf * math.nan


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=1)])
def test_a_sequence_without_numbers_ends_alone(engine: MLXEngine, sampling: Sampling) -> None:
    sampling = replace(sampling, max_tokens=5)
    good, bad = PROMPTS[2], PROMPTS[3]
    broken = begun(engine, bad)
    for cache in broken:
        cache.state = tree_map(without_numbers, cache.state)
    with pytest.raises(SupraError, match="not finite"):
        list(engine.generate(bad[-1:], engine.copy(broken), sampling))
    batch = engine.batch(8)
    keys = [
        batch.add(prompt[-1:], state, sampling, prompt[:-1], top=1)
        for prompt, state in ((good, begun(engine, good)), (bad, broken))
    ]
    said: dict[int, list[int]] = {key: [] for key in keys}
    errors = []
    while len(said[keys[0]]) < 5:
        for spoken in batch.step():
            if spoken.error is not None:
                errors.append((spoken.key, str(spoken.error), spoken.token))
                batch.take(spoken.key)
            else:
                said[spoken.key].append(spoken.token)
    ((key, told, token),) = errors
    assert (key, token) == (keys[1], None) and "not finite" in told
    assert said == {keys[0]: alone(engine, good, sampling), keys[1]: []}
    batch.close()
