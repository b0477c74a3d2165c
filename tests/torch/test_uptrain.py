"""Uptraining: it learns, it resumes to the last bit, and it refuses what it cannot do."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from supra_core.artifact import folder as artifact  # noqa: E402
from supra_core.conversion.linearize import LinearizeOptions, linearize  # noqa: E402
from supra_core.errors import SupraError  # noqa: E402
from supra_core.sources.source import open_source  # noqa: E402
from supra_core.tensors import LazyTensor  # noqa: E402
from supra_torch.recipes.config import UptrainConfig, resolve  # noqa: E402
from supra_torch.run_folder import checkpoint  # noqa: E402
from supra_torch.run_folder.lock import Lock  # noqa: E402
from supra_torch.uptrain import gradients as gradients_module  # noqa: E402
from supra_torch.uptrain.guard import LossGuard  # noqa: E402
from supra_torch.uptrain.interrupts import Stop  # noqa: E402
from supra_torch.uptrain.run import uptrain  # noqa: E402
from tests.tables import thinned  # noqa: E402
from tests.torch.uptraining import (  # noqa: E402
    end_by,
    logged_losses,
    run_in_process,
    weights_in,
)


@pytest.fixture(scope="module")
def finished(settings: UptrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed, on one thread."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    run_in_process(settings, run).wait()
    return run


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


@pytest.mark.parametrize("kills", thinned([(14,), (5, 14)], [(14,)]))
def test_killed_and_resumed_ends_the_same(
    settings: UptrainConfig, finished: Path, tmp_path: Path, kills: tuple[int, ...]
) -> None:
    run = tmp_path / "killed"
    for wanted in kills:
        process = run_in_process(settings, run, pause=0.05)
        assert end_by(signal.SIGKILL, process, run, wanted) == -signal.SIGKILL
    assert run_in_process(settings, run).wait() == 0
    assert logged_losses(run) == logged_losses(finished)
    ours, theirs = weights_in(run / "model"), weights_in(finished / "model")
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours[name], expected)


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


@pytest.mark.slow
def test_a_damaged_checkpoint_says_how_to_go_on_without_it(
    settings: UptrainConfig, finished: Path, tmp_path: Path
) -> None:
    run = tmp_path / "damaged"
    assert end_by(signal.SIGTERM, run_in_process(settings, run, pause=0.05), run, 5) == 75
    newest = checkpoint.checkpoints(run)[-1]
    weights = sorted(newest.rglob("*.safetensors"))
    assert len(weights) == 2
    remedy = f"or delete {newest}, to resume from {checkpoint.checkpoints(run)[-2]}"
    for file in (newest / "state.json", newest / "model" / "config.json", *weights):
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(SupraError, match=re.escape(remedy)):
            uptrain(settings, run)
        file.write_bytes(whole)
    shutil.rmtree(newest)
    assert run_in_process(settings, run).wait() == 0
    assert logged_losses(run) == logged_losses(finished)


def test_a_finished_run_is_not_trained_again(settings: UptrainConfig, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    assert uptrain(settings, finished)["already_finished"]
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_other_settings_are_refused(settings: UptrainConfig, finished: Path) -> None:
    other = settings.model_copy(update={"seed": 1})
    with pytest.raises(
        SupraError, match=r"another setting of seed \(seed was \d+ and is \d+ now\)"
    ):
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
    assert run_in_process(config, run).wait() == 0
    assert logged_losses(run) == logged_losses(finished)
    with pytest.raises(SupraError, match="no longer holds its transformer"):
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
    assert logged_losses(tmp_path / "own") != logged_losses(tmp_path / "others")
    record = json.loads((tmp_path / "others" / "run.json").read_text())
    assert record["teacher"] == str(other)


def test_a_loss_that_is_not_finite_stops(settings: UptrainConfig, tmp_path: Path) -> None:
    stage = settings.stages[1].model_copy(update={"learning_rate": 1e30, "warmup": 0.0})
    config = settings.model_copy(update={"stages": (settings.stages[0], stage)})
    with pytest.raises(SupraError, match="gives up at step .* not both finite"):
        uptrain(config, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step_00000010").is_dir()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tokens": "many"}, "field tokens"),
        ({"segment_tokens": "true"}, "field segment_tokens: must be a number"),
        ({"activation_checkpointing": "-2"}, "must be true, false or a number of layers, not -2"),
        ({"tokns": "3"}, "field tokns"),
        ({"stages.7.learning_rate": "1e-3"}, "unknown setting stages.7.learning_rate"),
        ({"stages.0.kind": "guess"}, r"field stages\.0\.kind"),
        ({"linearize.window": "-4"}, r"field linearize\.window"),
        ({"sequence_length": "33", "stages.0.cut": "2"}, "33 cannot be cut into 2"),
        (
            {"reduce_dtype": "float64", "device_rows": "2"},
            "device_rows 2 and reduce_dtype float64 exclude each other",
        ),
        (
            {"reduce_dtype": "float64", "segment_tokens": "64"},
            "segment_tokens 64 and reduce_dtype float64 exclude each other",
        ),
        (
            {"context_parallel": "2", "segment_tokens": "64"},
            "context_parallel 2 and segment_tokens 64 exclude each other",
        ),
        (
            {"context_parallel": "2", "reduce_dtype": "float64"},
            "context_parallel 2 and reduce_dtype float64 exclude each other",
        ),
        (
            {"context_parallel": "3"},
            r"context_parallel 3 does not divide the rows of 256 tokens of stages\.0",
        ),
        ({"context_parallel": "0"}, "field context_parallel"),
        ({"recipe": "magic"}, "unknown recipe 'magic'"),
    ],
)
def test_wrong_settings_are_named(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(SupraError, match=message):
        resolve(config=None, model="m", recipe=None, data="d", overrides=overrides)


def test_one_process_shares_no_rows(settings: UptrainConfig, tmp_path: Path) -> None:
    config = settings.model_copy(update={"context_parallel": 2})
    with pytest.raises(SupraError, match="context_parallel is 2: one process is not a multiple"):
        uptrain(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_recipe_in_a_file_is_a_name(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('model = "m"\ndata = "d"\nrecipe = 5\n')
    with pytest.raises(SupraError, match="field recipe: 5 is not a name: use one of"):
        resolve(config=file, model=None, recipe=None, data=None, overrides={})


def test_weights_that_are_no_numbers_are_not_trained(
    settings: UptrainConfig, tmp_path: Path
) -> None:
    source = open_source(settings.model)
    name = "model.layers.1.mlp.up_proj.weight"
    broken = source.tensors[name].read().copy()
    broken[3, 2] = np.nan
    tensors = {**source.tensors, name: LazyTensor.of(broken)}
    artifact.write(tmp_path / "model", source.spec, tensors, source.assets(), dtype="float32")
    config = settings.model_copy(update={"model": str(tmp_path / "model")})
    with pytest.raises(SupraError, match=r"up_proj\.weight holds NaN or infinity"):
        uptrain(config, tmp_path / "run")


def test_a_run_that_never_began_may_be_corrected(settings: UptrainConfig, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one word")
    run = tmp_path / "run"
    with pytest.raises(SupraError, match="too few for two sequences"):
        uptrain(settings.model_copy(update={"data": str(short)}), run)
    assert uptrain(settings.model_copy(update={"tokens": 128}), run)["steps"] == 2


def test_a_corrected_run_is_locked(settings: UptrainConfig, tmp_path: Path) -> None:
    """Its run.json is another file than the one that was locked at first."""
    (tmp_path / "run.json").write_text("{}")
    ours, others = (Lock(tmp_path, lambda text: None) for _ in range(2))
    ours.take()
    (tmp_path / "beside").write_text("{}")
    (tmp_path / "beside").replace(tmp_path / "run.json")
    ours.take()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("supra_torch.run_folder.lock._PATIENCE", 0.0)
        with pytest.raises(SupraError, match="is being trained by another process"):
            others.take()
    ours.release()
    others.take()
    others.release()


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

    computed = gradients_module.gradients
    monkeypatch.setattr(gradients_module, "gradients", gradients)
    # One stage of 60 steps.
    config = settings.model_copy(update={"stages": settings.stages[:1], "tokens": 60 * 64})
    run = tmp_path / "run"
    with pytest.raises(SupraError, match=r"the loss diverges at step \d+ .*is kept"):
        uptrain(config, run)
    losses = logged_losses(run)
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
    assert steps == len(logged_losses(run)) == 5
    assert open_source(run).spec.provenance.trained_tokens == 5 * 64
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupts_elsewhere_than_in_the_main_thread_are_left_alone() -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with Stop():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_a_run_from_before_a_setting_existed_goes_on(
    settings: UptrainConfig, finished: Path
) -> None:
    file = finished / "run.json"
    record = json.loads(file.read_text())
    del record["config"]["divergence"]
    file.write_text(json.dumps(record))
    assert uptrain(settings, finished)["already_finished"]
    assert uptrain(settings.model_copy(update={"device_rows": 1}), finished)["already_finished"]
    with pytest.raises(SupraError, match="another setting of divergence"):
        uptrain(settings.model_copy(update={"divergence": 4.0}), finished)


def test_a_run_goes_on_from_another_directory(
    settings: UptrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One model has many names; another one of the same name is another model."""
    assert isinstance(settings.data, str)
    (tmp_path / "text.txt").symlink_to(settings.data)
    for place in ("here", "there"):
        shutil.copytree(settings.model, tmp_path / place / "model")
    monkeypatch.chdir(tmp_path / "here")
    short = {"tokens": 256, "data": "../text.txt", "model": "model"}
    config = settings.model_copy(update=short)
    uptrain(config, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "there")
    with pytest.raises(SupraError, match="another setting of model"):
        uptrain(config, tmp_path / "run")
    named = {"model": "../here/model", "data": str(tmp_path / "text.txt")}
    assert uptrain(config.model_copy(update=named), tmp_path / "run")["already_finished"]
    with pytest.raises(SupraError, match="another setting of data"):
        uptrain(config.model_copy(update=named | {"data": "gone.txt"}), tmp_path / "run")
