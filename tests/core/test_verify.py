"""The figures of verify, perplexity and sizes on cases that can be done by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from supra_core.errors import FormatError, SupraError
from supra_core.measure.perplexity import losses_of
from supra_core.measure.tasks.perplexity import perplexity
from supra_core.measure.verify import candidates, compare, random_ids, read_ids, verify
from supra_core.mixers.base import kv_bytes_per_token
from supra_core.mixers.linear import LinearAttention
from supra_core.mixers.parts import FeatureMap, LearnedDecay, Projection, SumNormaliser
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.layout import parameter_count
from supra_core.model.sizes import measure
from supra_core.model.spec import Experts, LayerSpec, ModelSpec
from supra_core.runtime.sampling import Sampling, generate, penalised, sample
from supra_core.text import EncodedText
from tests.tiny_models import lazy_weights, with_experts

SOFTMAX = SoftmaxAttention()
LINEAR = LinearAttention(
    FeatureMap("signed_softmax", 8, Projection("per_head")), "before", LearnedDecay(),
    SumNormaliser(),
)  # fmt: skip


def model(*mixers: LinearAttention | SoftmaxAttention) -> ModelSpec:
    return ModelSpec(
        vocab_size=11, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, value_head_dim=8, eos_token_id=(10,),
        layers=tuple(LayerSpec(mixer) for mixer in mixers),
    )  # fmt: skip


class Counting:
    """A backend that is sure of the next number: after n comes n + 1."""

    name = "counting"
    spec = model(SOFTMAX)

    def logits(self, ids: Any, *, mask: Any = None, form: str = "parallel") -> Any:
        return 50.0 * np.eye(11, dtype=np.float32)[(np.asarray(ids) + 1) % 11]

    def prefill(self, ids: Any, state: Any = None, *, mask: Any = None) -> Any:
        return self.logits(ids), (state or 0) + ids.shape[1]

    def step(self, ids: Any, state: Any) -> Any:
        return self.logits(ids), state + 1

    def state_arrays(self, state: Any) -> Any:
        return {}

    def state_from_arrays(self, arrays: Any) -> Any:
        return None


def test_equal_logits_have_no_difference() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    found = compare(logits, logits)
    assert (found.max_abs_difference, found.mean_kl, found.top1_agreement) == (0.0, 0.0, 1.0)


def test_difference_by_hand() -> None:
    first = np.log(np.array([[[0.5, 0.5], [0.75, 0.25]]], dtype=np.float32))
    other = np.log(np.array([[[0.5, 0.5], [0.25, 0.75]]], dtype=np.float32))
    found = compare(first, other)
    assert found.max_abs_difference == pytest.approx(math.log(3))
    assert found.mean_kl == pytest.approx(0.5 * math.log(3) / 2)
    assert found.top1_agreement == 0.5


def test_a_difference_that_is_no_number_is_not_hidden() -> None:
    first = np.zeros((1, 2, 3), dtype=np.float32)
    other = first.copy()
    other[0, 0, 0] = np.nan
    assert not compare(first, other).max_abs_difference <= 1e9
    # Two positions, of which one has no likeliest token.
    assert compare(first, other).top1_agreement == 0.5
    assert compare(other, other).top1_agreement == 0.5


def test_what_is_compared_with_what() -> None:
    a, b = Path("a"), Path("b")

    def pairs(*arguments: Any) -> list[tuple[str, Path, str]]:
        return [(c.label, c.path, c.form) for c in candidates(*arguments)]

    assert pairs(a, None, ["torch", "mlx"], "step") == [("torch", a, "step"), ("mlx", a, "step")]
    assert pairs(a, b, ["torch", "mlx"], "parallel") == [
        ("torch", a, "parallel"),
        ("mlx", b, "parallel"),
    ]
    assert pairs(a, b, ["torch"], "parallel")[1] == ("torch-second", b, "parallel")
    assert pairs(a, None, ["torch"], "step")[0] == ("torch-parallel", a, "parallel")
    assert len(pairs(a, None, ["torch"], "parallel")) == 1
    with pytest.raises(SupraError, match="twice"):
        candidates(a, None, ["torch", "torch"], "parallel")


@pytest.mark.parametrize(
    ("dtype", "share"), [("float32", 1e-4), ("float16", 2e-2), ("bfloat16", 1e-1)]
)
def test_the_default_tolerance_is_a_share_of_the_largest_logit(
    monkeypatch: pytest.MonkeyPatch, dtype: str, share: float
) -> None:
    """Of 50 here; a right model's rounding grows with its logits, and with the type's."""

    class Off(Counting):
        error = 0.0

        def logits(self, ids: Any, *, mask: Any = None, form: str = "parallel") -> Any:
            return super().logits(ids) + np.float32(self.error)

    loaded = {"reference": Counting(), "torch": Off()}
    monkeypatch.setattr("supra_core.runtime.backend.load", lambda name, path, dtype: loaded[name])
    monkeypatch.setattr("supra_core.runtime.backend.check_installed", lambda name: None)
    both = candidates(Path("a"), None, ("reference", "torch"), "parallel")
    for error, passed in ((0.9, True), (1.1, False)):
        loaded["torch"].error = error * share * 50  # type: ignore[attr-defined]
        report = verify(both, random_ids(11), dtype=dtype)
        assert report.passed is passed
        assert report.tolerance == pytest.approx(50 * share)
    assert not verify(both, random_ids(11), dtype=dtype, tolerance=1e-6).passed


def test_ids_are_fixed_and_files_are_checked(tmp_path: Path) -> None:
    assert np.array_equal(random_ids(100), random_ids(100))
    np.save(tmp_path / "ids.npy", np.arange(5))
    assert read_ids(tmp_path / "ids.npy").shape == (1, 5)
    np.save(tmp_path / "floats.npy", np.ones(3))
    with pytest.raises(FormatError, match="no integers"):
        read_ids(tmp_path / "floats.npy")
    with pytest.raises(FormatError, match="cannot be read"):
        read_ids(tmp_path / "absent.npy")


def test_losses_are_cross_entropy() -> None:
    logits = np.log(np.array([[[0.25, 0.75], [0.5, 0.5]]], dtype=np.float32))
    assert losses_of(logits, np.array([[0, 1]]))[0, 0] == pytest.approx(-math.log(0.75))


def test_perplexity_over_windows_and_a_rest() -> None:
    ids = np.arange(10) % 11
    text = EncodedText("0123456789", ids, np.arange(1, 11))
    found = perplexity(Counting(), text, length=4, batch=2)
    # Windows of 4, 4 and 2 tokens predict 3 + 3 + 1, one byte each.
    assert (found["tokens"], found["text_bytes"]) == (7, 7)
    assert found["metrics"]["perplexity"] == pytest.approx(1.0)


def test_generation_stops_at_the_end_of_text() -> None:
    assert list(generate(Counting(), [5, 6], Sampling(max_tokens=20))) == [7, 8, 9]
    assert len(list(generate(Counting(), [1], Sampling(max_tokens=2)))) == 2
    with pytest.raises(SupraError, match="token id 11 is outside"):
        next(generate(Counting(), [1, 11], Sampling()))


def test_sampling_respects_top_p() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.2], dtype=np.float32))
    generator = np.random.default_rng(0)
    drawn = {sample(logits, Sampling(temperature=1.0, top_p=0.6), generator) for _ in range(100)}
    assert drawn == {0, 1}
    settings = Sampling(temperature=1.0, min_p=0.5)
    drawn = {sample(logits, settings, generator) for _ in range(100)}
    assert drawn == {0, 1}


def test_a_repetition_penalty_makes_what_was_said_less_likely() -> None:
    logits = np.array([2.0, -1.0, 3.0, 0.5], dtype=np.float32)
    found = penalised(logits, [1, 0, 1], 2.0)
    np.testing.assert_array_equal(found, np.array([1.0, -2.0, 3.0, 0.5], dtype=np.float32))
    assert logits[0] == 2.0


def test_state_is_fixed_and_caches_grow() -> None:
    token = kv_bytes_per_token(model(SOFTMAX))
    assert token == 2 * (8 + 8) * 2
    state = 4 * 16 * (8 + 1) * 4  # heads, features, values and their sum, float32
    pure = measure(model(LINEAR, LINEAR), {})
    assert (pure.state_bytes, pure.growing_bytes_per_token) == (2 * state, 0)
    assert pure.break_even_tokens == math.ceil(2 * state / (2 * token))
    hybrid = measure(model(LINEAR, SOFTMAX), {})
    assert (hybrid.state_bytes, hybrid.growing_bytes_per_token) == (state, token)
    assert hybrid.memory_bytes(10) == state + 10 * token
    assert hybrid.break_even_tokens == math.ceil(state / token)
    transformer = measure(model(SOFTMAX, SOFTMAX), {})
    assert (transformer.state_bytes, transformer.break_even_tokens) == (0, None)


def test_a_step_reads_weights_and_moves_the_state() -> None:
    spec = model(LINEAR, SOFTMAX)
    found = measure(spec, lazy_weights(spec))
    head = spec.vocab_size * spec.hidden_size
    # Without a tied head all but the embedding is read, in float32 here.
    assert found.step_weight_bytes == found.weight_bytes - 4 * head
    before = found.step_bytes(0)
    assert before == found.step_weight_bytes + 2 * found.state_bytes
    assert found.step_bytes(10) - before == 10 * found.growing_bytes_per_token
    spec = model(SOFTMAX, SOFTMAX)
    plain = measure(spec, lazy_weights(spec))
    assert found.transformer_step_bytes(7) == plain.step_bytes(7) == plain.transformer_step_bytes(7)


def test_a_step_reads_the_experts_of_its_token() -> None:
    spec = with_experts(model(LINEAR, SOFTMAX), Experts(5, 2, 16), dense=(1,))
    found = measure(spec, lazy_weights(spec))
    assert found.parameters == parameter_count(spec)
    one = 3 * spec.hidden_size * 16
    assert found.active_parameters == found.parameters - 3 * one
    head = spec.vocab_size * spec.hidden_size
    assert found.step_weight_bytes == 4 * (found.active_parameters - head)
    two = replace(spec, experts=Experts(2, 2, 16))
    # The router has a row for every expert.
    assert found.active_parameters - 3 * spec.hidden_size == parameter_count(two)


def test_a_window_adds_its_buffers() -> None:
    windowed = LinearAttention(
        LINEAR.feature_map, "before", LearnedDecay(), SumNormaliser(), window=5
    )
    extra = measure(model(windowed), {}).state_bytes - measure(model(LINEAR), {}).state_bytes
    assert extra == 5 * 2 * (8 + 8 + 16) * 2  # keys, values and features, 16 bit


def test_a_sliding_window_holds_no_more_than_there_was() -> None:
    token = kv_bytes_per_token(model(SOFTMAX))
    found = measure(model(SoftmaxAttention(5), SoftmaxAttention(9), SOFTMAX), {})
    assert found.state_bytes == (5 + 9) * token
    for context in (0, 3, 5, 7, 9, 30):
        held = min(context, 5) + min(context, 9) + context
        assert found.memory_bytes(context) == held * token
        assert found.step_bytes(context) == held * token
    exact = measure(model(SoftmaxAttention(5), SOFTMAX), {}, cache_itemsize=4)
    assert exact.memory_bytes(7) == (5 + 7) * 2 * token


WINDOWS = st.lists(st.none() | st.integers(1, 200), max_size=4)


@given(replaced=WINDOWS, kept=WINDOWS)
def test_the_break_even_is_the_last_context_at_which_sizes_change_places(
    replaced: list[int | None], kept: list[int | None]
) -> None:
    """Linear layers in the place of ``replaced`` windows, None being none, and ``kept`` ones."""
    assume(replaced or kept)
    theirs = [SoftmaxAttention(window) for window in [*replaced, *kept]]
    spec = model(*[LINEAR] * len(replaced), *theirs[len(replaced) :])
    provenance = replace(spec.provenance, replaced_mixers=tuple(theirs))
    found = measure(replace(spec, provenance=provenance), {})
    token = kv_bytes_per_token(spec)

    def transformer(context: int) -> int:
        return token * sum(min(mixer.window or context, context) for mixer in theirs)

    # A linear layer's state is worth 36 tokens, and windows end at 200.
    last = 4 * 36 + 200
    for context in range(last):
        assert found.transformer_memory_bytes(context) == transformer(context)
    greater = [found.memory_bytes(n) > transformer(n) for n in range(last)]
    if not replaced or greater[-1]:
        assert found.break_even_tokens is None
    else:
        assert found.break_even_tokens == last - greater[::-1].index(True)


def test_the_transformers_own_windows_count() -> None:
    """Gemma 3 of 1 B parameters: 26 layers of one head of 256, every sixth over all tokens."""
    sliding = [SoftmaxAttention(None if layer % 6 == 5 else 512) for layer in range(26)]
    spec = replace(model(*sliding), num_key_value_heads=1, head_dim=256, value_head_dim=256)
    found = measure(spec, {})
    assert found.transformer_memory_bytes(131_072) == (4 * 512 + 22 * 2) * 2**18
    assert found.transformer_memory_bytes(131_072) == found.memory_bytes(131_072)
    assert found.transformer_step_bytes(9_000) == found.step_bytes(9_000)
