"""The commands as a user runs them, from a tiny transformer to its perplexity."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from supra_cli.main import app
from supra_core.artifact import folder as artifact
from supra_core.measure.tasks import TASKS
from supra_core.measure.tasks.by_distance import Batch, DistanceTask, Material, batch_sizes
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.sources.source import WRITERS, open_source
from supra_core.tensors import LazyTensor
from tests.tiny_models import SPECS, lazy_weights

runner = CliRunner()


def result(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    """The JSON that a command prints."""
    done = runner.invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == code, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def converted(tiny_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "windowed"
    found = result("convert", tiny_transformer, out, "--window", "16")
    assert found["linearized"]
    assert found["layer_types"] == ["linear_attention", "linear_attention"]
    return out


def test_convert_leaves_a_linear_source_as_it_is(converted: Path, tmp_path: Path) -> None:
    found = result("convert", converted, tmp_path / "again")
    assert not found["linearized"]
    assert found["recipe"] == "windowed"


def test_weights_that_are_no_numbers_are_told(tiny_transformer: Path, tmp_path: Path) -> None:
    source = open_source(tiny_transformer)
    tensors = dict(source.tensors)
    for name in list(tensors)[:5]:
        tensors[name] = LazyTensor.of(np.full(tensors[name].shape, np.inf, np.float32))
    out = tmp_path / "damaged"
    WRITERS["hf"](out, source.spec, tensors, source.assets(), dtype="float32")
    done = runner.invoke(app, ["convert", str(out), str(tmp_path / "a"), "--no-calibrate"])
    assert done.exit_code == 0, done.output
    assert "warning: " in done.stderr and " and 2 more contain NaN or infinity" in done.stderr
    found = result("convert", out, tmp_path / "b", "--no-calibrate")
    assert sorted(found["not_finite"]) == sorted(list(tensors)[:5])
    done = runner.invoke(app, ["convert", str(out), str(tmp_path / "c"), "--calibrate"])
    assert done.exit_code == 2 and "nothing can be calibrated" in done.stderr
    assert not (tmp_path / "c").exists()


def test_rope_factors_are_for_longrope(tiny_transformer: Path, tmp_path: Path) -> None:
    for factors, message in (("both", "'both' is unknown"), ("long", "has no longrope scaling")):
        arguments = ("convert", str(tiny_transformer), str(tmp_path / "a"), "--no-calibrate")
        done = runner.invoke(app, [*arguments, "--rope-factors", factors])
        assert done.exit_code == 2 and message in done.stderr


def test_what_is_not_calibrated_is_said_or_refused(
    converted: Path, tiny_transformer: Path, tmp_path: Path
) -> None:
    done = runner.invoke(app, ["convert", str(tiny_transformer), str(tmp_path / "a"), "--fold"])
    assert done.exit_code == 0, done.output
    assert "not calibrated: --fold" in done.stderr
    done = runner.invoke(app, ["convert", str(converted), str(tmp_path / "b"), "--calibrate"])
    assert done.exit_code == 2
    assert "start from the transformer" in done.stderr


def test_an_output_is_refused_before_it_is_calibrated(
    converted: Path, tiny_transformer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("supra_torch.calibration.conversion")

    def calibrated(*given: Any, **named: Any) -> Any:
        raise AssertionError("minutes of work")

    monkeypatch.setattr(torch.TextCalibration, "__call__", calibrated)
    for arguments in ((converted,), (converted / "new", "--dtype", "float8")):
        done = runner.invoke(app, ["convert", str(tiny_transformer), *map(str, arguments)])
        assert done.exit_code == 2, done.output


def test_convert_keeps_what_it_is_told(tiny_transformer: Path, tmp_path: Path) -> None:
    found = result("convert", tiny_transformer, tmp_path / "a", "--keep-softmax", "0")
    assert found["layer_types"] == ["full_attention", "linear_attention"]
    found = result("convert", tiny_transformer, tmp_path / "b", "--no-linearize")
    assert found["layer_types"] == ["full_attention", "full_attention"]
    found = result("convert", tiny_transformer, tmp_path / "c", "--recipe", "paper", "--fold")
    assert found["folded"]
    found = result("convert", tiny_transformer, tmp_path / "d", "--to", "hf")
    assert not found["linearized"]


def test_inspect(converted: Path) -> None:
    found = result("inspect", converted)
    assert found["kind"] == "supra"
    assert found["growing_bytes_per_token"] == 0
    assert found["break_even_tokens"] > 0
    shown = runner.invoke(app, ["inspect", str(converted)])
    assert "window 16" in shown.stdout


def test_inspect_beside_a_transformer_with_windows(tmp_path: Path) -> None:
    """What stands for windows of 4 and 8 tokens is never smaller than what they hold."""
    spec = SPECS["sink"]
    theirs = (SoftmaxAttention(4), SoftmaxAttention(8))
    spec = replace(spec, provenance=replace(spec.provenance, replaced_mixers=theirs))
    artifact.write(tmp_path / "m", spec, lazy_weights(spec), {}, dtype="float32")
    found = result("inspect", tmp_path / "m")
    assert found["transformer_windows"] == [4, 8]
    assert found["break_even_tokens"] is None
    shown = runner.invoke(app, ["inspect", str(tmp_path / "m")]).stdout
    assert "2 of 2 layers hold the last 4, 8 tokens only" in shown
    assert "never: the transformer's windows hold less" in shown


def test_inspect_experts(tmp_path: Path) -> None:
    spec = SPECS["experts"]
    artifact.write(tmp_path / "m", spec, lazy_weights(spec), {}, dtype="float32")
    found = result("inspect", tmp_path / "m")
    # Two layers of three have five experts, of which a token goes through two.
    assert found["parameters"] - found["active_parameters"] == 2 * 3 * 3 * 24 * 16
    shown = runner.invoke(app, ["inspect", str(tmp_path / "m")]).stdout
    assert "2 of 5 a token, 16 channels each, in 2 layers" in shown
    assert f"{found['active_parameters']:,}" in shown


def test_verify_between_backends(converted: Path, tmp_path: Path) -> None:
    pytest.importorskip("mlx")
    chosen = [x for name in ("reference", "torch", "mlx") for x in ("--backend", name)]
    found = result("verify", converted, *chosen, "--save-logits", tmp_path)
    assert found["passed"]
    assert [entry["label"] for entry in found["comparisons"]] == ["torch", "mlx"]
    logits = np.load(tmp_path / "mlx.npy")
    assert logits.dtype == np.float32
    assert logits.shape[:2] == (1, found["tokens"])


def test_verify_against_transformers(tiny_transformer: Path, tmp_path: Path) -> None:
    result("convert", tiny_transformer, tmp_path / "same", "--no-linearize")
    arguments = ("--backend", "transformers", "--backend", "torch", "--text", "The state of it")
    for form in ("parallel", "step"):
        found = result("verify", tiny_transformer, tmp_path / "same", *arguments, "--form", form)
        assert found["comparisons"][0]["max_abs_difference"] < 1e-5


def test_verify_of_one_backend_compares_its_forms(converted: Path) -> None:
    found = result("verify", converted, "--backend", "torch", "--form", "step")
    assert found["first"] == "torch-parallel"
    assert found["passed"]


def test_verify_fails_with_exit_code_1(converted: Path, tiny_transformer: Path) -> None:
    found = result(
        "verify", converted, tiny_transformer, "--backend", "reference", "--tolerance", "0", code=1
    )
    assert not found["passed"]


def test_eval_with_the_teacher_beside_it(
    converted: Path, tiny_transformer: Path, text_file: Path
) -> None:
    found = result(
        "eval", converted, "--tasks", "perplexity", "--data", text_file, "--limit", "300",
        "--length", "64", "--teacher", tiny_transformer,
    )  # fmt: skip
    student = found["results"]["perplexity"]
    teacher = found["teacher"]["perplexity"]
    assert student["dtype"] == teacher["dtype"] == "float32"
    assert student["tokens"] == 300 - 5  # five windows, whose first tokens are given
    assert student["length"] == student["stride"] == 64
    # Random weights know nothing: near the size of the vocabulary, both.
    assert student["metrics"]["perplexity"] == pytest.approx(
        teacher["metrics"]["perplexity"], rel=0.1
    )


@pytest.mark.parametrize("backend", ["torch", "mlx", "reference"])
def test_eval_of_tasks_writes_a_record(
    converted: Path, tiny_transformer: Path, text_file: Path, tmp_path: Path, backend: str
) -> None:
    if backend != "reference":
        pytest.importorskip(backend)
    files = {
        "last.jsonl": {"context": "The cat sat on the", "continuation": "mat"},
        "one.jsonl": {"query": "Who?\n", "choices": ["he", "she said"], "gold": 1},
        "two.jsonl": {"query": "What?\n", "choices": ["it", "a house"], "gold": 0},
    }
    for name, item in files.items():
        (tmp_path / name).write_text("\n".join([json.dumps(item)] * 3))
    data = [x for name in (text_file, *files) for x in ("--data", tmp_path / name)]
    out = tmp_path / "record.json"
    found = result(
        "eval", converted, *data, "--limit", "3", "--form", "recurrent", "--teacher",
        tiny_transformer, "--backend", backend, "--out", out,
    )  # fmt: skip
    names = {"perplexity", "lambada", "multiple_choice:one", "multiple_choice:two"}
    assert found["results"].keys() == found["teacher"].keys() == names
    assert found["results"]["lambada"]["form"] == "recurrent"
    assert found["teacher"]["lambada"]["form"] == "parallel"
    assert found["results"]["lambada"]["examples"] == 3
    accuracies = found["results"]["multiple_choice:one"]["metrics"]
    # The same question three times: right or wrong, but always the same.
    assert accuracies["acc"] in (0.0, 1.0)
    assert accuracies["acc_stderr"] == 0.0
    record = json.loads(out.read_text("utf-8"))
    assert record["results"] == found["results"]
    assert {"command", "date", "machine"} <= record.keys()


def test_eval_measures_every_task(
    converted: Path, tiny_transformer: Path, text_file: Path, tmp_path: Path
) -> None:
    """One run of all that are registered: the teacher beside each, results by name, a table."""
    example = {
        "context": "The state of a", "continuation": "network",
        "query": "What?\n", "choices": ["it", "a house"], "gold": 0,
    }  # fmt: skip
    examples = tmp_path / "examples.jsonl"
    examples.write_text(json.dumps(example))
    out = tmp_path / "record.json"
    done = runner.invoke(
        app,
        [
            "eval", str(converted), "--tasks", ",".join(TASKS), "--data", str(text_file),
            "--data", str(examples), "--limit", "16", "--teacher", str(tiny_transformer),
            "--backend", "torch", "--out", str(out),
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text("utf-8"))
    assert found["results"].keys() == found["teacher"].keys() == TASKS.keys()
    for name, record in found["results"].items():
        assert record["metrics"].keys() == found["teacher"][name]["metrics"].keys()
        assert record["model"] == str(converted) and record["seconds"] >= 0
        assert f"{name}: " in done.stderr
        assert all(metric in done.stdout for metric in record["metrics"] if "_std" not in metric)


def test_eval_generates_what_a_task_needs(converted: Path, tiny_transformer: Path) -> None:
    """Without any file, and the same for both models."""
    found = result(
        "eval", converted, "--tasks", "copying,recall", "--limit", "2", "--seed", "3",
        "--teacher", tiny_transformer,
    )  # fmt: skip
    for side in ("results", "teacher"):
        assert found[side].keys() == {"copying", "recall"}
        for record in found[side].values():
            assert (record["data"], record["seed"], record["sequences"]) == ("generated", 3, 2)
            assert [one["distance"] for one in record["distances"]] == sorted(
                {int(metric.split("@")[1]) for metric in record["metrics"]}
            )


class _Repeated(DistanceTask):
    """One word, running text, and the word again."""

    name = "repeated"

    def span(self, material: Material) -> int:
        return 1

    def batches(self, generator: Any, material: Material, sequences: int) -> Any:
        for count in batch_sizes(sequences, 2):
            words = material.draw(generator, count, 2)
            yield Batch(words[:, :1], words[:, :1], 1, [(0, words, np.ones(count, int))])


def test_a_further_task_is_one_class_and_one_line(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "repeated", _Repeated())
    arguments = ["eval", str(converted), "--tasks", "repeated", "--limit", "2", "--no-teacher"]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "among@16" in done.stdout and "repeated: 2 sequences" in done.stderr
    assert "repeated" in runner.invoke(app, [*arguments[:3], "wonder"]).stderr


def test_eval_says_when_no_teacher_is_known(
    converted: Path, tiny_transformer: Path, text_file: Path
) -> None:
    arguments = ["eval", str(converted), "--data", str(text_file), "--limit", "20"]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "no teacher" in done.stderr
    done = runner.invoke(app, [*arguments, "--no-teacher"])
    assert "no teacher" not in done.stderr
    done = runner.invoke(app, [*arguments, "--teacher", str(converted)])
    assert done.exit_code == 2
    assert "is not a transformer" in done.stderr


@pytest.fixture(scope="module")
def short(tiny_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer with 32 positions."""
    folder = tmp_path_factory.mktemp("positions") / "short"
    shutil.copytree(tiny_transformer, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 32}))
    return folder


def test_eval_says_where_windows_are_longer_than_a_transformer_reads(
    converted: Path, short: Path, text_file: Path
) -> None:
    arguments = ["eval", str(converted), "--data", str(text_file), "--teacher", str(short)]
    for length in (32, 33):
        given = [*arguments, "--limit", "100", "--length", str(length)]
        found = result(*given)
        assert "beyond_positions" not in found["results"]["perplexity"]
        assert found["teacher"]["perplexity"].get("beyond_positions") == (
            32 if length > 32 else None
        )
        shown = runner.invoke(app, given)
        assert ("the teacher is a transformer of 32 positions" in shown.stderr) == (length > 32)


def test_eval_says_how_many_prompts_are_longer_than_the_positions(
    converted: Path, short: Path, tmp_path: Path
) -> None:
    lines = [{"context": "The state " * n, "continuation": "size"} for n in (1, 40, 60)]
    file = tmp_path / "last.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    arguments = ["eval", str(converted), "--data", str(file), "--teacher", str(short)]
    found = result(*arguments)
    assert "cut_prompts" not in found["results"]["lambada"]
    assert found["teacher"]["lambada"]["cut_prompts"] == 2
    shown = runner.invoke(app, arguments)
    assert "2 prompts are longer than the positions of the teacher" in shown.stderr


def test_eval_does_not_write_over_its_data(converted: Path, text_file: Path) -> None:
    before = text_file.read_bytes()
    arguments = ["eval", str(converted), "--data", str(text_file), "--no-teacher"]
    done = runner.invoke(app, [*arguments, "--out", str(text_file), "--force"])
    assert done.exit_code == 2
    assert "is one of the files of --data" in done.stderr
    assert text_file.read_bytes() == before


def test_eval_reads_the_same_text_with_another_tokenizer(
    converted: Path, other_tokenizer: Path, text_file: Path
) -> None:
    arguments = ["eval", converted, "--data", text_file, "--teacher", other_tokenizer]
    found = result(*arguments, "--limit", "100")
    student, teacher = (found[key]["perplexity"] for key in ("results", "teacher"))
    assert student["tokens"] == 99
    assert "same_tokens" not in student
    assert teacher["same_tokens"] is False
    # A letter is a token there, and the first one of either is not predicted.
    tokenizer = open_source(converted).tokenizer()
    text = tokenizer.encode(text_file.read_text()).head(100)
    assert student["text_bytes"] == int(text.ends[-1] - text.ends[0])
    assert teacher["tokens"] == teacher["text_bytes"] == int(text.ends[-1]) - 1
    done = runner.invoke(app, [*map(str, arguments), "--limit", "20"])
    assert "only bits per byte compare" in done.stderr


@pytest.fixture(scope="module")
def other_tokenizer(tiny_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The transformer with a tokenizer whose every letter is a token."""
    folder = tmp_path_factory.mktemp("other") / "letters"
    shutil.copytree(tiny_transformer, folder)
    stated = json.loads((folder / "tokenizer.json").read_text())
    stated["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(stated))
    return folder


def test_what_cannot_be_scored_is_refused_before_anything_is_measured(
    converted: Path, tiny_transformer: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def loaded(*given: Any, **named: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("supra_core.runtime.backend.load", loaded)
    last = tmp_path / "last.jsonl"
    last.write_text(json.dumps({"context": "The state", "continuation": "size " * 2000}))
    arguments = ["--data", str(text_file), "--data", str(last), "--limit", "20"]
    done = runner.invoke(app, ["eval", str(converted), *arguments, "--no-teacher"])
    assert done.exit_code == 2
    assert "last.jsonl" in done.stderr and "does not fit" in done.stderr
    # A teacher with too few positions, too.
    few = tmp_path / "few"
    shutil.copytree(tiny_transformer, few)
    config = json.loads((few / "config.json").read_text())
    (few / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    last.write_text(json.dumps({"context": "The state", "continuation": "size " * 20}))
    done = runner.invoke(app, ["eval", str(converted), *arguments, "--teacher", str(few)])
    assert done.exit_code == 2
    assert f"last.jsonl with {few}" in done.stderr


def test_what_the_harness_prints_is_not_in_the_record(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = pytest.importorskip("supra_torch.inference.lm_eval", reason="torch is not installed")

    def talkative(*arguments: object, **settings: object) -> dict[str, Any]:
        print("a data set's own line")
        return {"arc_easy": {"acc": 0.5}}

    monkeypatch.setattr(evaluate, "evaluate", talkative)
    monkeypatch.setattr("importlib.util.find_spec", lambda *given: True)
    found = result("eval", converted, "--tasks", "arc_easy", "--backend", "torch", "--no-teacher")
    assert found["results"]["arc_easy"]["acc"] == 0.5


def test_eval_forms_agree(converted: Path, text_file: Path) -> None:
    found = [
        result("eval", converted, "--data", text_file, "--limit", "100", "--form", form)
        for form in ("parallel", "recurrent")
    ]
    values = [entry["results"]["perplexity"]["metrics"]["nats_per_token"] for entry in found]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_generate_and_chat(converted: Path, backend: str) -> None:
    pytest.importorskip(backend)
    chosen = ("--backend", backend, "--max-tokens", "4")
    found = result("generate", converted, "The state", "--raw", *chosen)
    again = result("generate", converted, "The state", "--raw", *chosen)
    assert found["text"] == again["text"]
    plain = runner.invoke(app, ["generate", str(converted), "The state", "--raw", *chosen])
    assert plain.stdout == found["text"] + "\n"
    talk = runner.invoke(
        app, ["chat", str(converted), *chosen], input="hello\nand on\n/clear\n/exit\nnever said\n"
    )
    assert talk.exit_code == 0, talk.output
    assert talk.stdout.count("\n") >= 2


def test_uptrain_and_its_model(tiny_transformer: Path, text_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = (
        "uptrain", tiny_transformer, "--data", text_file, "--out", run,
        "--set", "tokens=256", "--set", "sequence_length=32", "--set", "batch_tokens=64",
    )  # fmt: skip
    first = result(*arguments)
    assert (run / "model" / "config.json").is_file()
    assert result(*arguments)["tokens"] == first["tokens"]  # finished: nothing is done again
    found = result("eval", run, "--data", text_file, "--limit", "100")
    # The run names its teacher.
    assert found["teacher"]["perplexity"]["model"] == str(tiny_transformer)


def test_doctor() -> None:
    found = result("doctor")
    assert found["python"]
    assert found["advice"]


def test_doctor_compares_the_kernel_where_there_is_one() -> None:
    found = result("doctor", "--deep")
    if found["mlx_device"] == "metal":
        assert all(row["passed"] for row in found["kernels"])
    else:
        assert found["kernels"] is None


@pytest.mark.parametrize(
    ("absent", "first"), [({"mlx"}, "torch-parallel"), ({"torch", "mlx"}, "reference-parallel")]
)
def test_verify_takes_the_backends_that_are_installed(
    converted: Path, absent: set[str], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supra_core.runtime.backend._absent", lambda name: list(absent & {name}))
    found = result("verify", converted, "--form", "recurrent", "--tolerance", "1")
    assert found["first"] == first
