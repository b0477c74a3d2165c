"""Uptraining: it learns, it resumes to the last bit, and it refuses what it cannot do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from supra_core import artifact  # noqa: E402
from supra_core.errors import SupraError  # noqa: E402
from supra_core.linearize import LinearizeOptions, linearize  # noqa: E402
from supra_core.sources import open_source  # noqa: E402
from supra_core.tensors import LazyTensor  # noqa: E402
from supra_torch.uptrain import checkpoint  # noqa: E402
from supra_torch.uptrain import data as data_module  # noqa: E402
from supra_torch.uptrain import run as run_module  # noqa: E402
from supra_torch.uptrain.config import (  # noqa: E402
    DataPart,
    UptrainConfig,
    recipe_names,
    resolve,
)
from supra_torch.uptrain.data import Mixture, Sequences, mixture  # noqa: E402
from supra_torch.uptrain.guard import LossGuard  # noqa: E402
from supra_torch.uptrain.interrupts import deferred_interrupts  # noqa: E402
from supra_torch.uptrain.run import learning_rate_factor, uptrain  # noqa: E402

SETTINGS = {
    "tokens": "1280", "sequence_length": "32", "batch_tokens": "64", "checkpoint_every": "3",
    "precision": "float32", "linearize.window": "8", "epochs": "100",
    # Calibrated, so small a model has little left to learn.
    "calibrate": "none",
}  # fmt: skip
# Ten steps of two sequences in each stage.
EVEN_STAGES = {
    "stages.0.share": "1.0", "stages.0.cut": "1", "stages.0.batch_share": "1.0",
    "stages.1.share": "1.0", "stages.1.batch_share": "1.0",
}  # fmt: skip


@pytest.fixture(scope="module")
def settings(tiny_transformer: Path, text_file: Path) -> UptrainConfig:
    return resolve(
        config=None, model=str(tiny_transformer), recipe=None, data=str(text_file),
        overrides={**SETTINGS, **EVEN_STAGES},
    )  # fmt: skip


def _losses(run: Path) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def _weights(folder: Path) -> dict[str, Any]:
    return {name: tensor.read() for name, tensor in artifact.read(folder).tensors.items()}


@pytest.fixture(scope="module")
def finished(settings: UptrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed, on one thread."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    _run_in_process(settings, run).wait()
    return run


def _run_in_process(settings: UptrainConfig, run: Path, pause: float = 0.0) -> Any:
    """The run in a process of its own, on one thread; ``pause`` seconds after every step."""
    script = (
        "import sys, time, torch\n"
        "torch.set_num_threads(1)\n"
        "from pathlib import Path\n"
        "from supra_torch.uptrain.config import UptrainConfig\n"
        "from supra_torch.uptrain.run import uptrain\n"
        f"uptrain(UptrainConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]),\n"
        f"        progress=lambda *a, **k: time.sleep({pause}))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", script, settings.model_dump_json(), str(run)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def test_it_learns(finished: Path) -> None:
    records = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for stage in ("transfer", "distill"):
        losses = [record["loss"] for record in records if record.get("stage") == stage]
        assert len(losses) == 10
        assert losses[-1] < losses[0]
    model = open_source(finished)
    assert model.kind == "run"
    assert model.spec.provenance.trained_tokens == 1280
    assert "tokenizer.json" in model.assets()


def test_killed_and_resumed_ends_the_same(
    settings: UptrainConfig, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "killed"
    for wanted in (5, 14):
        process = _run_in_process(settings, run, pause=0.05)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (run / "metrics.jsonl").is_file() and len(_complete_losses(run)) >= wanted:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert _run_in_process(settings, run).wait() == 0
    assert _losses(run) == _losses(finished)
    ours, theirs = _weights(run / "model"), _weights(finished / "model")
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours[name], expected)


def _complete_losses(run: Path) -> list[str]:
    return [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


def test_ctrl_c_writes_a_checkpoint(settings: UptrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "interrupted"

    def interrupt(stage: str, done: int, total: int, **metrics: float) -> None:
        if stage == "transfer" and done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        uptrain(settings, run, progress=interrupt)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["step_00000003", "step_00000005"]
    assert open_source(run).spec.provenance.trained_tokens == 5 * 64


def test_a_finished_run_is_not_trained_again(settings: UptrainConfig, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert uptrain(settings, finished)["already_finished"]
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_other_settings_are_refused(settings: UptrainConfig, finished: Path) -> None:
    other = settings.model_copy(update={"seed": 1})
    with pytest.raises(SupraError, match="begun with another seed"):
        uptrain(other, finished)


def test_a_converted_model_holds_its_own_teacher(
    settings: UptrainConfig, tiny_transformer: Path, finished: Path, tmp_path: Path
) -> None:
    source = open_source(tiny_transformer)
    spec, tensors = linearize(source.spec, source.tensors, LinearizeOptions(window=8))
    folder = tmp_path / "converted"
    artifact.write(folder, spec, tensors, source.assets(), dtype="float32")
    config = settings.model_copy(update={"model": str(folder)})
    run = tmp_path / "run"
    assert _run_in_process(config, run).wait() == 0
    assert _losses(run) == _losses(finished)
    with pytest.raises(SupraError, match="no longer holds the transformer"):
        uptrain(settings.model_copy(update={"model": str(run / "model")}), tmp_path / "again")


def test_a_converted_model_is_uptrained_as_it_was_converted(
    tiny_transformer: Path, text_file: Path, tmp_path: Path
) -> None:
    source, folder = open_source(tiny_transformer), tmp_path / "pure"
    spec, tensors = linearize(source.spec, source.tensors, LinearizeOptions("pure"))
    artifact.write(folder, spec, tensors, source.assets(), dtype="float32")

    def resolved(recipe: str | None, **more: str) -> UptrainConfig:
        return resolve(
            config=None, model=str(folder), recipe=recipe, data=str(text_file),
            overrides={"tokens": "128", "sequence_length": "32", "batch_tokens": "64", **more},
        )  # fmt: skip

    assert resolved(None).recipe == "pure"
    with pytest.raises(SupraError, match="converted by recipe pure, and windowed begins"):
        uptrain(resolved("windowed"), tmp_path / "run")
    with pytest.raises(SupraError, match="other mixers than pure"):
        uptrain(resolved(None, **{"linearize.decay": "none"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_teacher_may_be_another_transformer(
    settings: UptrainConfig, tiny_transformer: Path, tmp_path: Path
) -> None:
    source, other = open_source(tiny_transformer), tmp_path / "other"
    louder = {
        name: LazyTensor.of(tensor.read() * (2 if name.endswith("norm.weight") else 1))
        for name, tensor in source.tensors.items()
    }
    artifact.write(other, source.spec, louder, source.assets(), dtype="float32")
    few = settings.model_copy(update={"tokens": 128})
    uptrain(few, tmp_path / "own")
    uptrain(few.model_copy(update={"teacher": str(other)}), tmp_path / "others")
    assert _losses(tmp_path / "own") != _losses(tmp_path / "others")
    record = json.loads((tmp_path / "others" / "run.json").read_text())
    assert record["teacher"] == str(other)


def test_more_text_may_be_given_before_the_first_step(
    settings: UptrainConfig, text_file: Path, tmp_path: Path
) -> None:
    text, run = tmp_path / "text.txt", tmp_path / "run"
    text.write_text("too short " * 3)
    config = settings.model_copy(update={"data": str(text), "tokens": 128})
    with pytest.raises(SupraError, match=r"text\.txt has .* too few"):
        uptrain(config, run)
    text.write_text(text_file.read_text())
    assert uptrain(config, run)["steps"] == 2
    (run / "summary.json").unlink()
    text.write_text("other")
    with pytest.raises(SupraError, match="not the data this run began with"):
        uptrain(config, run)


@pytest.mark.parametrize("content", ["", b"\xff\xfe"])
def test_text_that_is_none_is_named(
    settings: UptrainConfig, tmp_path: Path, content: str | bytes
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SupraError, match=r"text\.txt"):
        uptrain(settings.model_copy(update={"data": str(text)}), tmp_path / "run")


def test_a_stage_must_have_something_to_train(settings: UptrainConfig, tmp_path: Path) -> None:
    with pytest.raises(SupraError, match="nothing would learn"):
        resolve(
            config=None, model="m", recipe=None, data="d",
            overrides={"stages.0.learning_rate": "0.0", "stages.0.new_learning_rate": "0.0"},
        )  # fmt: skip
    softmax = settings.linearize.model_copy(update={"keep_softmax": (0, 1)})
    with pytest.raises(SupraError, match="transfer stage has nothing to train"):
        uptrain(settings.model_copy(update={"linearize": softmax}), tmp_path / "run")


def test_a_loss_that_is_not_finite_stops(settings: UptrainConfig, tmp_path: Path) -> None:
    stage = settings.stages[1].model_copy(update={"learning_rate": 1e30, "warmup": 0.0})
    config = settings.model_copy(update={"stages": (settings.stages[0], stage)})
    with pytest.raises(SupraError, match="no longer finite"):
        uptrain(config, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step_00000010").is_dir()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tokens": "many"}, "field tokens"),
        ({"tokns": "3"}, "field tokns"),
        ({"stages.7.learning_rate": "1e-3"}, "no such setting"),
        ({"stages.0.kind": "guess"}, r"field stages\.0\.kind"),
        ({"linearize.window": "-4"}, r"field linearize\.window"),
        ({"sequence_length": "33", "stages.0.cut": "2"}, "33 cannot be cut into 2"),
        ({"recipe": "magic"}, "unknown recipe 'magic'"),
    ],
)
def test_wrong_settings_are_named(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(SupraError, match=message):
        resolve(config=None, model="m", recipe=None, data="d", overrides=overrides)


def test_missing_data_is_named(settings: UptrainConfig, tmp_path: Path) -> None:
    config = settings.model_copy(update={"data": str(tmp_path / "none.txt")})
    with pytest.raises(SupraError, match=r"none\.txt does not exist"):
        uptrain(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_never_began_may_be_corrected(settings: UptrainConfig, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one word")
    run = tmp_path / "run"
    with pytest.raises(SupraError, match="too few for two sequences"):
        uptrain(settings.model_copy(update={"data": str(short)}), run)
    assert uptrain(settings.model_copy(update={"tokens": 128}), run)["steps"] == 2


def test_a_file_is_no_run_folder(settings: UptrainConfig, text_file: Path) -> None:
    with pytest.raises(SupraError, match="is a file"):
        uptrain(settings, text_file)


def test_a_diverging_loss_stops(
    settings: UptrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps of a falling loss, then one that grows by a half a step."""
    steps = 0

    def gradients(*arguments: Any, **options: Any) -> float:
        nonlocal steps
        loss, steps = computed(*arguments, **options), steps + 1
        return loss * 1.5 ** max(0, steps - 20)

    computed = run_module.gradients
    monkeypatch.setattr(run_module, "gradients", gradients)
    # One stage of 60 steps.
    config = settings.model_copy(update={"stages": settings.stages[:1], "tokens": 60 * 64})
    run = tmp_path / "run"
    with pytest.raises(SupraError, match=r"the loss diverges at step \d+ .*is kept"):
        uptrain(config, run)
    losses = _losses(run)
    assert 20 < len(losses) < 60
    # The newest checkpoint is from before it was bad, though later ones were due.
    newest = checkpoint.read_place(checkpoint.checkpoints(run)[-1])
    assert newest.step < len(losses) - config.checkpoint_every
    good = LossGuard(config.divergence, losses[: newest.step])
    assert good.healthy


def test_the_guard_goes_on_from_logged_losses() -> None:
    losses = [1.0] * 30 + [2.0] * 8 + [6.0] * 30
    guard, states = LossGuard(3.0), []
    for index, loss in enumerate(losses):
        guard.add(loss)
        again = LossGuard(3.0, losses[: index + 1])
        assert (again.diverged, again.healthy) == (guard.diverged, guard.healthy)
        states.append((guard.healthy, guard.diverged))
    assert states[37] == (True, False)
    # (8 * 2 + 8 * 6) / 16 = 4 times the least.
    assert states[45] == (False, True)


ADAPTERS = {
    "linearize.window": "8", "tokens": "1280", "sequence_length": "32", "batch_tokens": "64",
    "checkpoint_every": "3", "precision": "float32", "calibrate": "none", "epochs": "100",
    "stages.0.share": "1.0", "stages.0.cut": "1", "stages.0.batch_share": "1.0",
    "stages.1.share": "1.0", "stages.1.batch_share": "1.0", "stages.1.lora_rank": "3",
}  # fmt: skip


@pytest.fixture(scope="module")
def low_rank(settings: UptrainConfig) -> UptrainConfig:
    """The recipe lora on a tiny model."""
    return resolve(
        config=None, model=settings.model, recipe="lora", data=settings.data, overrides=ADAPTERS
    )


def test_adapters_train_and_are_merged(low_rank: UptrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert _run_in_process(low_rank, run).wait() == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record.get("stage") == "distill"]
    assert losses[-1] < losses[0]
    trained, source = _weights(run / "model"), open_source(low_rank.model)
    frozen = {name: tensor.read() for name, tensor in source.tensors.items()}
    assert trained.keys() >= frozen.keys()
    for name, before in frozen.items():
        change = trained[name] - before
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")):
            # A product of matrices with three columns, up to float32.
            singular = np.linalg.svd(change.astype(np.float64), compute_uv=False)
            assert singular[0] > 1e-5
            assert singular[3] < 1e-5 * max(1.0, float(np.abs(before).max()))
        else:
            np.testing.assert_array_equal(trained[name], before)


def test_adapters_resume_to_the_last_bit(low_rank: UptrainConfig, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _run_in_process(low_rank, whole).wait() == 0
    process = _run_in_process(low_rank, killed, pause=0.05)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        # In the second stage, after a checkpoint with adapters.
        if (killed / "metrics.jsonl").is_file() and len(_complete_losses(killed)) >= 16:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (checkpoint.checkpoints(killed)[-1] / "adapters.safetensors").is_file()
    assert _run_in_process(low_rank, killed).wait() == 0
    assert _losses(killed) == _losses(whole)
    ours, theirs = _weights(killed / "model"), _weights(whole / "model")
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours[name], expected)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid(name: str) -> None:
    config = resolve(config=None, model="m", recipe=name, data="d", overrides={"tokens": "10_000"})
    assert sum(config.stage_steps()) >= len(config.stages)


def test_every_sequence_once_an_epoch() -> None:
    tokens = np.arange(1030, dtype=np.uint32)
    sequences = Sequences(tokens, length=10, seed=5)
    trained = sequences.count - sequences.held_out_count
    first = [int(sequences.sequence(number)[0]) for number in range(trained)]
    second = [int(sequences.sequence(number)[0]) for number in range(trained, 2 * trained)]
    held_out = {int(row[0]) for row in sequences.held_out()}
    assert sorted(first) == sorted(second)
    assert first != second
    assert len(set(first)) == trained
    assert not held_out & set(first)


def test_cut_sequences_are_the_same_tokens() -> None:
    data = _mixture([None], 1030)
    whole = data.batch(20, 3)
    np.testing.assert_array_equal(data.batch(20, 6, cut=2).reshape(3, 10), whole)
    # 21 tokens were seen: the row that begins within them is left out.
    np.testing.assert_array_equal(data.batch(21, 1, cut=2), whole[:1, 5:])


def _mixture(shares: list[float | None], *sizes: int) -> Mixture:
    """Texts whose tokens say which text (thousands) and where in it."""
    tokens = [np.arange(size, dtype=np.uint32) + 10_000 * i for i, size in enumerate(sizes)]
    parts = [DataPart(path=str(i), share=share) for i, share in enumerate(shares)]
    return mixture(parts, tokens, 10, 5)


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([None, 0.25, None], [0.75 * 4 / 7, 0.25, 0.75 * 3 / 7]),
        ([0.5, 0.2, 0.3], [0.5, 0.2, 0.3]),
        ([0.1, 0.1, 0.2], [0.25, 0.25, 0.5]),
    ],
)
def test_a_mixture_keeps_its_shares(shares: list[float | None], expected: list[float]) -> None:
    data = _mixture(shares, 4090, 1030, 3070)
    assert data.shares == pytest.approx(expected, abs=0.01)
    taken: list[list[int]] = [[], [], []]
    for number in range(400):
        part, index = data.source(number)
        taken[part].append(index)
        for own, share in zip(taken, data.shares, strict=True):
            # Parts give their share at any time, not only in the end.
            assert abs(len(own) - share * (number + 1)) < 2.5
    assert all(own == list(range(len(own))) for own in taken)
    # Batches are slices of one order, whatever their size.
    rows = np.concatenate([data.batch(0, 3), data.batch(30, 5)])
    np.testing.assert_array_equal(rows, data.batch(0, 8))
    held_out = {int(row[0]) for row in data.held_out()}
    assert {start // 10_000 for start in held_out} == {0, 1, 2}
    assert not held_out & {int(row[0]) for row in data.batch(0, 900)}


def test_several_texts_train_one_model(
    settings: UptrainConfig, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[::-1])
    config = resolve(
        config=None, model=settings.model, recipe=None, data=[str(text_file), f"{other}:0.25"],
        overrides={**SETTINGS, "tokens": "256"},
    )  # fmt: skip
    run = tmp_path / "run"
    assert uptrain(config, run)["tokens"] >= 192
    assert uptrain(config, run)["already_finished"]
    with pytest.raises(SupraError, match="begun with another data"):
        uptrain(config.model_copy(update={"data": str(text_file)}), run)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a:0.7", "b:0.6"], r"field data: the shares add up to 1\.3"),
        (["a:1.0", "b"], "leaves nothing for the others"),
        (["a:2", "b"], "--data a:2: a share is above 0 and at most 1"),
    ],
)
def test_impossible_shares_are_named(data: list[str], message: str) -> None:
    with pytest.raises(SupraError, match=message):
        resolve(config=None, model="m", recipe=None, data=data, overrides={})


def test_running_out_of_data_is_said_before_the_run(
    settings: UptrainConfig, tmp_path: Path
) -> None:
    config = settings.model_copy(update={"tokens": 10_000_000})
    with pytest.raises(SupraError, match=r"would read them \d+\.\d times.*set epochs=\d+"):
        uptrain(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_pieces_are_the_whole_text(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    text = "".join(f"line {i} " + "x" * (i % 97) + "\n" for i in range(9000)) + "no newline"
    file.write_text(text)
    pieces = list(data_module._pieces(file))
    assert len(pieces) > 1
    assert "".join(pieces) == text


def test_the_learning_rate_rises_then_falls() -> None:
    factors = [learning_rate_factor(step, 100, 0.1, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.1 <= factors[-1] < 0.11


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_waits_for_the_end_of_a_step(
    settings: UptrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted when the weights have just moved, the checkpoint says that they have."""
    run, steps = tmp_path / "interrupted", 0
    step = torch.optim.AdamW.step

    def interrupted(self: Any, *arguments: Any) -> Any:
        nonlocal steps
        result, steps = step(self, *arguments), steps + 1
        if steps == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        uptrain(settings, run)
    assert steps == len(_losses(run)) == 5
    assert open_source(run).spec.provenance.trained_tokens == 5 * 64
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupts_elsewhere_than_in_the_main_thread_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with deferred_interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


@pytest.fixture(scope="module")
def paper(settings: UptrainConfig) -> UptrainConfig:
    """The published recipe; its learning rate is too small to see in a few steps."""
    return resolve(
        config=None, model=settings.model, recipe="paper", data=settings.data,
        overrides={
            **{key: value for key, value in SETTINGS.items() if key != "linearize.window"},
            "stages.0.learning_rate": "1e-2", "stages.0.new_learning_rate": "1e-2",
        },
    )  # fmt: skip


def test_the_published_recipe_learns_without_a_teacher(
    paper: UptrainConfig, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    summary = uptrain(paper, run)
    losses = _losses(run)
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    # A trained model no longer holds its teacher, and this stage needs none.
    again = uptrain(
        paper.model_copy(update={"model": str(run / "model"), "tokens": 128}), tmp_path / "again"
    )
    assert again["teacher_held_out_perplexity"] is None
    assert again["held_out_perplexity"] < summary["teacher_held_out_perplexity"]


def test_activation_checkpointing_changes_no_loss(paper: UptrainConfig, tmp_path: Path) -> None:
    losses = []
    for checkpointing in (False, True):
        run = tmp_path / str(checkpointing)
        uptrain(
            paper.model_copy(update={"tokens": 256, "activation_checkpointing": checkpointing}), run
        )
        losses.append(_losses(run))
    # The same operations in the same order; threads may sum in another.
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_perplexity_is_measured_once(
    paper: UptrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def count(session: Any, model: Any) -> float:
        counted.append(model)
        return measured(session, model)

    measured = run_module._perplexity
    monkeypatch.setattr(run_module, "_perplexity", count)
    run = tmp_path / "run"
    uptrain(paper.model_copy(update={"tokens": 128, "evaluate_every": 1}), run)
    # The teacher's, the untrained model's, and one after each of two steps.
    assert len(counted) == 4


def test_a_run_from_before_a_setting_existed_goes_on(
    settings: UptrainConfig, finished: Path
) -> None:
    file = finished / "run.json"
    record = json.loads(file.read_text())
    del record["config"]["activation_checkpointing"]
    file.write_text(json.dumps(record))
    assert uptrain(settings, finished)["already_finished"]
    with pytest.raises(SupraError, match="begun with another activation_checkpointing"):
        uptrain(settings.model_copy(update={"activation_checkpointing": True}), finished)
