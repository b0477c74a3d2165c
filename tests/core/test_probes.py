"""The probes on backends whose answers are known by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from supra_core.errors import SupraError
from supra_core.measure.intervals import around, of_share
from supra_core.measure.probes.loops import check_loops, distinct_share, repeated_share
from supra_core.measure.probes.speed import speed
from supra_core.measure.probes.words import word_tokens
from supra_core.measure.tasks import TASKS, Options, Record, Subject
from supra_core.measure.tasks.copying import CUE_WORDS
from supra_core.measure.tasks.multiple_choice import Question
from supra_core.measure.tasks.positions import bin_edges, by_position
from supra_core.measure.tasks.recall import even_size
from supra_core.progress import silent
from supra_core.text import ModelTokenizer
from tests.tiny_models import SPECS, reference

VOCABULARY = 300
# One row's next token from all tokens so far.
Rule = Callable[[Sequence[int]], "np.ndarray[Any, Any]"]


class FakeBackend:
    """Logits (V,) by a rule over the tokens so far; the state is these tokens."""

    name = "fake"

    def __init__(self, rule: Rule, positions: int = 4096) -> None:
        self.spec = replace(SPECS["sink"], vocab_size=VOCABULARY, max_position_embeddings=positions)
        self._rule = rule
        self.fed = 0

    def prefill(self, ids: Any, state: Any = None, *, mask: Any = None) -> tuple[Any, Any]:
        ids = np.asarray(ids)
        self.fed += ids.size
        seen = np.zeros((len(ids), 0), dtype=np.int64) if state is None else state
        whole = np.concatenate([seen, ids], axis=1)
        first = seen.shape[1]
        logits = [
            [self._rule(row[: t + 1].tolist()) for t in range(first, whole.shape[1])]
            for row in whole
        ]
        return np.array(logits, dtype=np.float32), whole

    def step(self, ids: Any, state: Any) -> tuple[Any, Any]:
        logits, state = self.prefill(np.asarray(ids)[:, None], state)
        return logits[:, 0], state

    def logits(self, ids: Any, *, mask: Any = None, form: str = "parallel") -> Any:
        return self.prefill(ids)[0]


def _one_hot(token: int) -> Any:
    logits = np.zeros(VOCABULARY)
    logits[token] = 10.0
    return logits


def remembers(tokens: int) -> Rule:
    """What followed the last two tokens when they stood together before, if it is near enough."""

    def rule(seen: Sequence[int]) -> Any:
        for place in range(len(seen) - 2, 0, -1):
            if list(seen[place - 1 : place + 1]) == list(seen[-2:]):
                # A token comes again ``distance`` after it stood at place + 1.
                if len(seen) - (place + 1) <= tokens:
                    return _one_hot(seen[place + 1])
                break
        return _one_hot(0)

    return rule


@pytest.fixture(scope="module")
def tokenizer() -> ModelTokenizer:
    """Letters and marks, and two hundred words with a space before them, a token each."""
    marks = ["<|end|>", " ", ":", "\n", ".", *"ABCDEQnswer?"]
    letters = "bdfgklmt"
    words = [f"Ġ{a}{b}{c}" for a in letters for b in letters[:5] for c in letters[:5]]
    vocabulary = {token: index for index, token in enumerate([*dict.fromkeys(marks), *words])}
    assert len(vocabulary) <= VOCABULARY
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    made.add_special_tokens(["<|end|>"])
    return ModelTokenizer(made)


FILLER = np.zeros(700, dtype=np.int64)  # never one of the words
PROBES = ["recall", "copying"]


def measured(
    probe: str, model: FakeBackend, tokenizer: ModelTokenizer, filler: Any = FILLER, *,
    distances: tuple[int, ...], sequences: int, seed: int = 0,
) -> list[Any]:  # fmt: skip
    task: Any = TASKS[probe]
    material = task.material(model.spec, tokenizer, filler, distances)
    found = task.accuracies(model, material, sequences, seed) if material.distances else []
    return [SimpleNamespace(**one) for one in found]


@pytest.mark.parametrize("probe", PROBES)
def test_recall_ends_where_the_memory_does(probe: str, tokenizer: ModelTokenizer) -> None:
    model = FakeBackend(remembers(64))
    found = measured(probe, model, tokenizer, distances=(16, 32, 64, 128, 256), sequences=6)
    # Between the first of eight lines and its repetition there is no room for 16 tokens.
    short = [] if probe == "recall" else [16]
    assert [one.distance for one in found] == [*short, 32, 64, 128, 256]
    # Exactly up to the memory's length, so that a distance is what its docstring says.
    assert [one.greedy for one in found] == [*[1.0] * len(short), 1.0, 1.0, 0.0, 0.0]
    assert [one.among for one in found][:-2] == [1.0] * (len(found) - 2)
    for one in found:
        assert one.answers == (6 if probe == "recall" else 6 * (15 - CUE_WORDS))
        assert one.greedy_interval[0] <= one.greedy <= one.greedy_interval[1]


def test_recall_of_a_model_that_guesses_is_at_chance(tokenizer: ModelTokenizer) -> None:
    noise = np.random.default_rng(0)
    model = FakeBackend(lambda seen: noise.normal(size=VOCABULARY))
    found = measured("copying", model, tokenizer, distances=(16,), sequences=60)[0]
    assert found.by_chance == pytest.approx(sum(1 / n for n in range(2, 15)) / 13)
    assert found.among_interval[0] <= found.by_chance <= found.among_interval[1]


@pytest.mark.parametrize("probe", PROBES)
@pytest.mark.parametrize("latest", [True, False])
@pytest.mark.parametrize("sequences", [8, 16, 32, 40])
def test_preferring_recent_or_early_words_is_chance(
    probe: str, latest: bool, sequences: int, tokenizer: ModelTokenizer
) -> None:
    """No memory of what belongs together, only of what was said when."""

    def rule(seen: Sequence[int]) -> Any:
        logits = np.full(VOCABULARY, -1e4)
        places = enumerate(seen) if latest else reversed([*enumerate(seen)])
        for place, token in places:
            logits[token] = place if latest else -place
        return logits

    found = measured(probe, FakeBackend(rule), tokenizer, distances=(64,), sequences=sequences)[0]
    if probe == "recall":
        # Every line is asked as often as another one.
        assert found.among == found.by_chance == 1 / 8
    else:
        # The latest of the words to come is right only where it is the next; the earliest always,
        # which is what copying in order means.
        assert found.among == (0.0 if latest else 1.0)


def test_recall_is_seeded_and_feeds_a_sequence_once(tokenizer: ModelTokenizer) -> None:
    noise = lambda seen: np.random.default_rng(sum(seen)).normal(size=VOCABULARY)  # noqa: E731
    given: dict[str, Any] = {"distances": (16, 64, 128), "sequences": 8}
    first, second = FakeBackend(noise), FakeBackend(noise)
    assert measured("recall", first, tokenizer, seed=3, **given) == measured(
        "recall", second, tokenizer, seed=3, **given
    )
    # Eight pairs of four tokens, the text to the last distance, and three questions of two.
    assert first.fed <= 8 * (8 * 4 + 128 + 3 * 2)


def test_full_reports_ask_by_fours() -> None:
    """Their figures are those of batches of four."""
    assert [even_size(count) for count in (32, 64, 96, 8, 6)] == [4, 4, 4, 1, 1]


@pytest.mark.parametrize("probe", PROBES)
def test_text_beyond_the_vocabulary_is_refused(probe: str, tokenizer: ModelTokenizer) -> None:
    model = FakeBackend(remembers(64))
    beyond = np.append(FILLER, VOCABULARY)
    with pytest.raises(SupraError, match="token id 300 is outside"):
        measured(probe, model, tokenizer, beyond, distances=(64,), sequences=4)
    assert model.fed == 0


@pytest.mark.parametrize("probe", PROBES)
def test_a_sequence_begins_as_the_tokenizer_begins_a_text(
    probe: str, tokenizer: ModelTokenizer
) -> None:
    begun = Tokenizer.from_str(tokenizer.raw.to_str())
    end = begun.token_to_id("<|end|>")
    begun.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", end)]
    )
    beginnings = set()

    def rule(seen: Sequence[int]) -> Any:
        beginnings.add(seen[0])
        return remembers(64)(seen)

    # Room for the distance of 64 without the one token more, then with it.
    around = 32 if probe == "recall" else 16
    given: dict[str, Any] = {"distances": (64,), "sequences": 4}
    for positions, kept in ((64 + 2 * around, 0), (65 + 2 * around, 1)):
        model = FakeBackend(rule, positions)
        assert len(measured(probe, model, ModelTokenizer(begun), FILLER + 1, **given)) == kept
        assert len(measured(probe, FakeBackend(remembers(64), positions), tokenizer, **given)) == 1
    assert beginnings == {end}


def test_distances_that_do_not_fit_are_left_out(tokenizer: ModelTokenizer) -> None:
    model = FakeBackend(remembers(64), positions=128)
    found = measured("recall", model, tokenizer, distances=(2, 16, 32, 64, 128, 1024), sequences=4)
    assert [one.distance for one in found] == [32, 64]
    assert measured("copying", model, tokenizer, distances=(8,), sequences=4) == []


def test_words_are_whole_words_or_else_any_tokens(tokenizer: ModelTokenizer) -> None:
    ids, real = word_tokens(tokenizer.raw, VOCABULARY)
    assert real
    assert all(tokenizer.raw.id_to_token(index).startswith("Ġ") for index in ids)
    others, real = word_tokens(tokenizer.raw, 90, fewest=80)
    assert not real
    assert tokenizer.raw.token_to_id("<|end|>") not in others
    with pytest.raises(SupraError, match="needs 60"):
        word_tokens(tokenizer.raw, 10, fewest=60)


# --- positions ------------------------------------------------------------------------------


def test_positions_split_the_whole_loss() -> None:
    model = reference(SPECS["sink"])
    ids = np.random.default_rng(0).integers(50, size=(2, 150))
    bins = by_position(model, ids, piece=47)  # type: ignore[arg-type]
    found = [SimpleNamespace(**one) for one in bins]
    assert [(one.first, one.stop) for one in found] == [(1, 64), (64, 128), (128, 150)]
    assert [one.tokens for one in found] == [2 * 63, 2 * 64, 2 * 22]
    logits = model.logits(ids)[:, :-1]
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, ids[:, 1:, None], -1)[..., 0]
    for one in found:
        part = nats[:, one.first - 1 : one.stop - 1]
        assert one.perplexity == pytest.approx(math.exp(part.mean()), rel=1e-5)
        error = part.std(ddof=1) / math.sqrt(part.size)
        assert math.log(one.high) - math.log(one.low) == pytest.approx(2 * 1.96 * error, rel=1e-3)


def test_bins_double_and_cover_everything() -> None:
    assert bin_edges(2048) == [1, 64, 128, 256, 512, 1024, 2048]
    assert bin_edges(65) == [1, 64, 65]
    assert bin_edges(40) == [1, 40]


# --- permutations ---------------------------------------------------------------------------

QUESTIONS = [
    Question("Q?\n", ("bbb", "dbb", "fbb", "gbb"), 2),
    Question("Q?\n", ("gdd", "fdd", "ddd"), 0),
]


def permuted(
    model: FakeBackend, tokenizer: ModelTokenizer, questions: list[Question], seed: int = 0
) -> Record:
    subject, given = Subject(model.spec, tokenizer), Options(seed=seed)
    found = TASKS["permutations"].prepared(questions, subject, given)(model, silent, "")  # type: ignore[arg-type]
    return {**found["metrics"], **found}


def _answers(choose: Callable[[str], str], tokenizer: ModelTokenizer) -> FakeBackend:
    """A backend that answers a prompt by the letter that ``choose`` makes of it."""

    def rule(seen: Sequence[int]) -> Any:
        text = "".join(tokenizer.raw.id_to_token(token) for token in seen).replace("Ġ", " ")
        # The space before a letter is a token of its own here.
        return _one_hot(tokenizer.raw.token_to_id(choose(text) if text.endswith(": ") else "."))

    return FakeBackend(rule)


@pytest.fixture(scope="module")
def letters() -> ModelTokenizer:
    """Every character is a token."""
    text = "<\n .:?ABCDEFQabcdefgnrsw"
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(text)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return ModelTokenizer(made)


def test_a_model_that_always_says_one_letter_is_never_consistent(letters: ModelTokenizer) -> None:
    found = permuted(_answers(lambda text: "B", letters), letters, QUESTIONS)
    assert found["consistent"] == 0.0
    assert {one["letter"]: one["chosen"] for one in found["letters"]} == {
        "A": 0,
        "B": 1,
        "C": 0,
        "D": 0,
    }
    # Each content stands at B once.
    assert found["accuracy"] == pytest.approx(2 / 7)
    assert found["accuracy"] == found["accuracy_by_chance"]
    assert found["orders"] == 4 + 3


def test_a_model_that_knows_the_content_always_is(letters: ModelTokenizer) -> None:
    right = {"fbb", "fdd"}

    def choose(text: str) -> str:
        lines = [line for line in text.split("\n") if line[1:3] == ". "]
        return next(line[0] for line in lines if line[3:] in right)

    found = permuted(_answers(choose, letters), letters, QUESTIONS, seed=5)
    assert found["consistent"] == 1.0
    # The first question's gold is fbb, the second's is not fdd.
    assert found["accuracy"] == pytest.approx(4 / 7)
    assert found["by_chance"] == pytest.approx((4.0**-3 + 3.0**-2) / 2)
    for one in found["letters"]:
        assert one["chosen"] == pytest.approx(one["even"])
    assert sum(one["even"] for one in found["letters"]) == pytest.approx(1.0)


def test_letters_without_a_token_and_long_questions_are_refused(letters: ModelTokenizer) -> None:
    many = Question("Q?\n", ("b",) * 27, 0)
    with pytest.raises(SupraError, match="letters"):
        permuted(_answers(lambda text: "A", letters), letters, [many])
    small = FakeBackend(lambda seen: _one_hot(0))
    small.spec = replace(small.spec, vocab_size=letters.raw.token_to_id("D"))
    with pytest.raises(SupraError, match="outside the model's vocabulary"):
        permuted(small, letters, QUESTIONS)
    short = FakeBackend(lambda seen: _one_hot(0), positions=20)
    with pytest.raises(SupraError, match="20 positions"):
        permuted(short, letters, QUESTIONS)


# --- loops, speed, intervals ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        (list(range(40)), False),
        ([7] * 40, True),
        ([1, 2, 3] * 12, True),
        (list(range(20)) + [1, 2] * 15, True),
        (list(range(40)) + [5] * 10, False),  # a loop at the end covers a fifth
        (list(range(12)) * 2, False),  # said twice is no loop
        ([7] * 7, False),  # too short
        ([], False),
    ],
)
def test_loops(tokens: list[int], loops: bool) -> None:
    assert check_loops(tokens).loops is loops


def test_shares_of_a_text() -> None:
    assert repeated_share([9, 1, 2, 1, 2, 1, 2, 8]) == 6 / 8
    assert repeated_share([1, 2, 1, 2]) == 0.0
    assert distinct_share([1, 2, 3, 4, 1, 2, 3, 4]) == 4 / 5
    assert distinct_share([1, 2]) == 1.0


def test_speed_counts_its_tokens() -> None:
    model = FakeBackend(lambda seen: _one_hot(0))
    found = SimpleNamespace(**speed(model, 5, repeats=2, steps=3))
    assert model.fed == 5 * 3 + 1 + 3  # one prefill and one step are not counted
    assert found.decode_slowest <= found.decode <= found.decode_fastest
    assert found.prefill_slowest <= found.prefill <= found.prefill_fastest


def test_intervals() -> None:
    assert around(1.0, 0.5) == pytest.approx((1 - 0.98, 1 + 0.98), abs=1e-4)
    # Wilson's interval of 5 in 10, as in the literature's tables.
    assert of_share(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert of_share(0, 10)[0] == 0.0
    assert of_share(0, 10)[1] == pytest.approx(0.2775, abs=1e-4)
    assert of_share(10, 10)[1] == 1.0
    with pytest.raises(ValueError, match="trial"):
        of_share(0, 0)
