"""Scores of continuations and tasks made of them, against the definition's logits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from supra_core.errors import FormatError, SupraError
from supra_core.measure.perplexity import losses_of
from supra_core.measure.scoring import Pair, encode_pair, score
from supra_core.measure.tasks import TASKS, Options, Record, Subject, tasks_of
from supra_core.measure.tasks.lambada import Passage
from supra_core.measure.tasks.multiple_choice import Question
from supra_core.progress import silent
from supra_core.text import ModelTokenizer
from tests.tiny_models import SPECS, reference
from tests.tiny_tokenizers import SPECIAL, byte_level, with_bos

_LETTERS = " abcdefghijklmnopqrstuvwxyzAnswer:?."


@pytest.fixture(scope="module")
def tokenizer() -> ModelTokenizer:
    """A letter is a token, and two letters that often stand together are one."""
    vocabulary = {letter: index for index, letter in enumerate(dict.fromkeys(_LETTERS))}
    for pair in (" a", "th", "he"):
        vocabulary[pair] = len(vocabulary)
    assert len(vocabulary) <= 50
    merges = [(" ", "a"), ("t", "h"), ("h", "e")]
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    return ModelTokenizer(made)


def _measured(task: str, tokenizer: ModelTokenizer, examples: list[Any], **spec: Any) -> Record:
    model: Any = _Prefers()
    subject = Subject(replace(model.spec, **spec), tokenizer)
    return TASKS[task].prepared(examples, subject, Options())(model, silent, task)


def _random_pairs(count: int, seed: int = 0) -> list[Pair]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 30, size=(count, 2))
    draw = lambda n: tuple(int(x) for x in rng.integers(0, 50, n))  # noqa: E731
    return [Pair(draw(a), draw(b)) for a, b in sizes]


@pytest.mark.parametrize("batch_tokens", [1, 200, 10_000])
def test_batches_and_padding_change_nothing(batch_tokens: int) -> None:
    model = reference(SPECS["sink"])
    pairs = _random_pairs(12)
    found = score(model, pairs, batch_tokens=batch_tokens)  # type: ignore[arg-type]
    for pair, ours in zip(pairs, found, strict=True):
        ids = np.array([pair.context + pair.continuation])
        logits = model.logits(ids)
        expected = -losses_of(logits, ids)[0, len(pair.context) - 1 :].sum(dtype=np.float64)
        greedy = logits[0, len(pair.context) - 1 : -1].argmax(-1)
        # Losses are float32: 30 of size 2^3 rounded at 2^-24.
        assert ours.log_likelihood == pytest.approx(expected, abs=30 * 2.0**-21)
        assert ours.greedy == (greedy == pair.continuation).all()


def test_a_long_context_loses_its_beginning() -> None:
    model = reference(SPECS["sink"])
    long = Pair(tuple(range(40)), (3, 4))
    short = Pair(tuple(range(32, 40)), (3, 4))
    found = [score(model, [pair], max_length=10)[0] for pair in (long, short)]  # type: ignore[arg-type]
    assert found[0] == found[1]
    with pytest.raises(SupraError, match="does not fit into 10"):
        score(model, [Pair((1,), tuple(range(10)))], max_length=10)  # type: ignore[arg-type]


@pytest.mark.parametrize("pair", [Pair((), (3, 4)), Pair((3, 4), ())])
def test_an_empty_side_is_refused(pair: Pair) -> None:
    """It would be scored as certain."""
    model = reference(SPECS["sink"])
    side = "continuation" if pair.context else "context"
    with pytest.raises(SupraError, match=f"a {side} without a token"):
        score(model, [Pair((1,), (2,)), pair])  # type: ignore[arg-type]


@pytest.mark.parametrize("pair", [Pair((50,), (3,)), Pair((3,), (1, 50)), Pair((1, -1), (3,))])
def test_tokens_beyond_the_vocabulary_are_refused(pair: Pair) -> None:
    model = reference(SPECS["sink"])
    with pytest.raises(SupraError, match="outside the model's vocabulary of 50"):
        score(model, [Pair((1,), (2,)), pair])  # type: ignore[arg-type]


def test_spaces_move_to_the_continuation(tokenizer: ModelTokenizer) -> None:
    pair = encode_pair(tokenizer, "the ", "answer")
    text = [tokenizer.raw.id_to_token(index) for index in pair.continuation]
    assert text[0] == " a"
    assert pair == encode_pair(tokenizer, "the", " answer")
    with pytest.raises(SupraError, match="both need at least one token"):
        encode_pair(tokenizer, " ", "answer")


def test_a_context_begins_as_the_tokenizer_begins_a_text() -> None:
    plain, begun = map(ModelTokenizer, (byte_level(), with_bos(byte_level(), SPECIAL[1])))
    bos = plain.raw.token_to_id(SPECIAL[1])
    for context in ("the cat", "the ", SPECIAL[1] + "a"):
        without, found = (encode_pair(t, context, " sat") for t in (plain, begun))
        assert found.continuation == without.continuation
        begins = without.context[0] == bos
        assert found.context == (without.context if begins else (bos, *without.context))
    # As the harness does, where nothing else is left to predict from.
    assert encode_pair(begun, " ", "sat").context == (bos,)


def test_results_state_how_prompts_begin(tokenizer: ModelTokenizer) -> None:
    found = _measured("lambada", tokenizer, [Passage("the", "he")])
    assert found["text_form"].endswith("; no BOS")
    bos = Tokenizer.from_str(tokenizer.raw.to_str())
    bos.add_special_tokens(["."])
    bos.post_processor = processors.TemplateProcessing(
        single=". $A", special_tokens=[(".", bos.token_to_id("."))]
    )
    question = Question("who?", ("b", "w"), 1)
    asked = _measured("multiple_choice", ModelTokenizer(bos), [question])
    assert asked["text_form"].endswith("; behind the tokenizer's own .")


class _Prefers:
    """A backend for which a token is likelier, the greater its id."""

    name = "prefers"
    spec = SPECS["paper"]

    def logits(self, ids: Any, *, mask: Any = None, form: str = "parallel") -> Any:
        return np.broadcast_to(np.arange(50, dtype=np.float32), (*ids.shape, 50))


def test_multiple_choice_chooses_by_likelihood(tokenizer: ModelTokenizer) -> None:
    # "w" has a greater id than "b": alone it wins; six of them lose, but not by the letter.
    questions = [Question("who?", ("b", "w"), 1), Question("who?", ("b", "wwwwww"), 1)]
    found = _measured("multiple_choice", tokenizer, questions)["metrics"]
    assert found["acc"] == 0.5
    assert found["acc_stderr"] == pytest.approx(0.5)
    assert found["acc_norm"] == 1.0
    # The other one is right where the other one is the answer.
    swapped = [replace(question, gold=0) for question in questions]
    assert _measured("multiple_choice", tokenizer, swapped[:1])["metrics"]["acc"] == 0.0
    assert _measured("multiple_choice", tokenizer, swapped[1:])["metrics"]["acc"] == 1.0


def test_lambada_is_the_last_word(tokenizer: ModelTokenizer) -> None:
    passages = [Passage("the cat", "sat"), Passage("the", "hehe")]
    found = _measured("lambada", tokenizer, passages)
    assert found["metrics"]["acc"] == 0.0
    assert "cut_prompts" not in found
    # Of 50 logits 0 ... 49 the sum of exponentials is e^50 / (e - 1).
    normaliser = 50 - np.log(np.e - 1)
    likelihoods = []
    for one in passages:
        ids = encode_pair(tokenizer, one.context, " " + one.continuation).continuation
        likelihoods.append(sum(ids) - len(ids) * normaliser)
    assert np.log(found["metrics"]["perplexity"]) == pytest.approx(-np.mean(likelihoods), abs=1e-3)


def test_prompts_that_were_cut_are_counted(tokenizer: ModelTokenizer) -> None:
    passages = [Passage("the cat", "sat"), Passage("the cat " * 9, "sat")]
    longest = max(len(encode_pair(tokenizer, one.context, " sat")) for one in passages)
    for positions, cut in ((longest, 0), (longest - 1, 1)):
        found = _measured("lambada", tokenizer, passages, max_position_embeddings=positions)
        assert found.get("cut_prompts", 0) == cut


def test_files_say_what_they_are_for(tmp_path: Path) -> None:
    passage = {"context": "a", "continuation": "b"}
    question = {"query": "a", "choices": ["b", "c"], "gold": 1}
    for name, item in (("lambada", passage), ("multiple_choice", question)):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("\n".join(json.dumps(item) for _ in range(3)))
        assert tasks_of(file)[0].name == name
        # As a Windows editor saves it.
        file.with_suffix(".JSONL").write_text("\ufeff" + json.dumps(item))
        assert tasks_of(file.with_suffix(".JSONL"))[0].name == name
    assert tasks_of(tmp_path / "text.txt")[0].name == "perplexity"
    assert len(TASKS["lambada"].read(tmp_path / "lambada.jsonl", 2)) == 2
    questions = TASKS["multiple_choice"].read(tmp_path / "multiple_choice.jsonl")
    assert questions[0] == Question("a", ("b", "c"), 1)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "field gold"),
        ('{"query": "a", "choices": ["b", "c"], "gold": true}', "field gold"),
        ('{"query": "a", "choices": ["b"], "gold": 0}', "field choices"),
        ('{"query": "a", "choices": ["b", ""], "gold": 0}', "field choices"),
        ('{"query": "", "choices": ["b", "c"], "gold": 0}', "field query is empty"),
        ('{"choices": ["b", "c"], "gold": 0}', "field query must be a text, and is absent"),
        ("[1]", "not a JSON object"),
        ("{", "not JSON"),
        (r'{"query": "\ud83d", "choices": ["b", "c"], "gold": 0}', "not JSON"),
        ('{"query": "a", "choices": ["b", "c"], "gold": ' + "1" * 5000 + "}", "not JSON"),
        ('{"query": ' + "[" * 100_000 + "}", "not JSON"),
    ],
)
def test_wrong_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "file.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(SupraError, match=f"line 1.*{message}"):
        TASKS["multiple_choice"].read(file)


def test_unknown_fields_are_named(tmp_path: Path) -> None:
    file = tmp_path / "file.jsonl"
    file.write_text('{"text": "a"}\n')
    with pytest.raises(SupraError, match="fields text: a task needs context and cont"):
        tasks_of(file)


def test_a_line_of_json_ends_at_a_line_feed_only(tmp_path: Path) -> None:
    """Characters that str.splitlines() ends a line at may stand in a JSON text as they are."""
    file = tmp_path / "last.jsonl"
    odd = {"context": "A\u2028line\x85that goes on", "continuation": "here"}
    file.write_text(json.dumps(odd, ensure_ascii=False) + "\n\n" + json.dumps(odd) + "\n", "utf-8")
    assert tasks_of(file)[0].name == "lambada"
    assert [one.context for one in TASKS["lambada"].read(file)] == [odd["context"]] * 2
    file.write_text("\n \n")
    with pytest.raises(FormatError, match="holds no example"):
        TASKS["lambada"].read(file)
