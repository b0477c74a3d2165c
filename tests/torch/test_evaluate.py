"""The lm-eval harness on our models; only where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny_models import SPECS, lazy_weights

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval", reason="the lm-eval harness (extra eval) is not installed")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from supra_core.errors import SupraError  # noqa: E402
from supra_core.measure.tasks import TASKS, Options, Subject  # noqa: E402
from supra_core.progress import silent  # noqa: E402
from supra_core.text import ModelTokenizer  # noqa: E402
from supra_torch.inference.backend import TorchBackend  # noqa: E402
from supra_torch.inference.lm_eval import evaluate  # noqa: E402
from supra_torch.model.model import build  # noqa: E402

_LETTERS = " abcdefghijklmnopqrstuvwxyzA:?.\n"
_COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
"""
_CHOICE = """
task: local_choice
output_type: multiple_choice
doc_to_text: "{{query}}Answer:"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""
_LAST_WORD = """
task: local_last_word
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: " {{continuation}}"
metric_list:
  - metric: acc
  - metric: perplexity
"""
_ROLLING = """
task: local_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list:
  - metric: word_perplexity
"""
_UNTIL = """
task: local_until
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{continuation}}"
generation_kwargs:
  until: ["a"]
  max_gen_toks: 5
metric_list:
  - metric: exact_match
"""


@pytest.fixture(scope="module")
def model() -> TorchBackend:
    spec = SPECS["sink"]
    return TorchBackend(build(spec, lazy_weights(spec)), torch.device("cpu"))


@pytest.fixture(scope="module")
def tokenizer() -> ModelTokenizer:
    made = Tokenizer(models.WordLevel({c: i for i, c in enumerate(_LETTERS)}, unk_token="z"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return ModelTokenizer(made)


def _words(rng: np.random.Generator, count: int) -> str:
    letters = rng.choice(list("abcdefgh"), size=(count, 4))
    return " ".join("".join(word) for word in letters)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    rng = np.random.default_rng(0)
    questions = [
        {"query": _words(rng, 5) + "?\n", "choices": [_words(rng, n) for n in (1, 2, 3)], "gold": 1}
        for _ in range(12)
    ]
    passages = [{"context": _words(rng, 9), "continuation": _words(rng, 1)} for _ in range(12)]
    made = {}
    for name, items in (("questions", questions), ("passages", passages)):
        made[name] = tmp_path / f"{name}.jsonl"
        made[name].write_text("\n".join(json.dumps(item) for item in items) + "\n")
    tasks = {"choice": _CHOICE, "last_word": _LAST_WORD, "rolling": _ROLLING, "until": _UNTIL}
    for name, text in tasks.items():
        data = made["questions" if name == "choice" else "passages"]
        made[name] = tmp_path / f"{name}.yaml"
        made[name].write_text(text + _COMMON.format(data=data))
    return made


def test_the_harness_agrees_with_our_tasks(
    model: TorchBackend, tokenizer: ModelTokenizer, files: dict[str, Path]
) -> None:
    found = evaluate(model, tokenizer, [str(files["choice"]), str(files["last_word"])])
    ours, last = (
        task.prepared(task.read(files[data]), Subject(model.spec, tokenizer), Options())(
            model, silent, ""
        )["metrics"]
        for task, data in ((TASKS["multiple_choice"], "questions"), (TASKS["lambada"], "passages"))
    )
    for name in ("acc", "acc_norm"):
        assert found["local_choice"]["metrics"][name] == ours[name]
    theirs = found["local_last_word"]["metrics"]
    assert theirs["acc"] == last["acc"]
    assert theirs["perplexity"] == pytest.approx(last["perplexity"], rel=1e-5)
    assert found["local_choice"]["examples"] == 12


def test_rolling_and_generation(
    model: TorchBackend, tokenizer: ModelTokenizer, files: dict[str, Path]
) -> None:
    names = [str(files[name]) for name in ("rolling", "until", "last_word")]
    told: list[tuple[str, int, int]] = []

    def progress(stage: str, done: int, total: int, **metrics: float) -> None:
        told.append((stage, done, total))

    found: dict[str, Any] = evaluate(
        model, tokenizer, names, limit=3, progress=progress, stage="model"
    )
    # Each kind of request in turn, all of its task.
    steps = [[("model", done, 3) for done in done_of] for done_of in ((1, 2, 3), (3,))]
    assert sorted(told) == sorted(steps[0] + steps[0] + steps[1])
    # Random weights over 32 letters, five to a word: far above 32, below chance for them all.
    assert 32 < found["local_text"]["metrics"]["word_perplexity"] < 1e12
    assert found["local_until"]["examples"] == 3


def test_unknown_tasks_are_named(
    model: TorchBackend, tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    with pytest.raises(SupraError, match="task wonder"):
        evaluate(model, tokenizer, ["wonder"])
    empty = tmp_path / "empty.yaml"
    empty.write_text("a: 1\n")
    with pytest.raises(SupraError, match="field task"):
        evaluate(model, tokenizer, [str(empty)])
