"""What is said and kept of a run beside its losses, and which steps it leaves out."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from supra_core.errors import SupraError  # noqa: E402
from supra_torch.recipes.config import UptrainConfig  # noqa: E402
from supra_torch.run_folder import checkpoint  # noqa: E402
from supra_torch.uptrain import stage as stage_module  # noqa: E402
from supra_torch.uptrain import watch  # noqa: E402
from supra_torch.uptrain.estimate import Estimate  # noqa: E402
from supra_torch.uptrain.guard import StepGuard  # noqa: E402
from supra_torch.uptrain.run import uptrain  # noqa: E402
from supra_torch.uptrain.step.data import Mixture  # noqa: E402
from supra_torch.uptrain.watch import figures, refuse_missing  # noqa: E402
from tests.torch.uptraining import logged_losses, weights_in  # noqa: E402


def test_a_spike_is_measured_by_the_median_of_64_steps() -> None:
    guard = StepGuard(spike=4.0, in_a_row=2)
    for step in range(64):
        assert guard.most() == math.inf
        guard.add(1.0 if step % 2 else 3.0)
    assert guard.most() == 8.0
    # What was left out does not move it, and three in a row are too many.
    for _ in range(2):
        guard.add(None)
        assert (guard.most(), guard.gives_up) == (8.0, False)
    guard.add(None)
    assert guard.gives_up
    guard.add(3.0)
    assert not guard.gives_up


def test_no_spike_is_one_unless_asked() -> None:
    guard = StepGuard(0.0, 0, [1.0] * 100)
    assert guard.most() == math.inf
    guard.add(None)
    assert guard.gives_up


def test_a_stage_says_once_how_long_it_takes() -> None:
    said, now = list[str](), 100.0
    estimate = Estimate("distill", 100, said.append, lambda: now)
    for _ in range(20):
        estimate.step(2_048, 3_000_000_000)
        now += 8.0
    # Three steps of 8 s after the first one; four are done.
    assert said == [
        "distill: 12 min 48 s left for 96 steps of 8 s (256 tokens/s, 3.0 GB of memory)"
    ]


def test_a_stage_that_is_over_soon_says_nothing() -> None:
    said, now = list[str](), 0.0
    estimate = Estimate("transfer", 3, said.append, lambda: now)
    for _ in range(3):
        estimate.step(2_048, None)
        now += 30.0
    assert said == ["transfer: 30 s left for 1 steps of 30 s (68 tokens/s)"] or not said


def test_only_numbers_become_curves() -> None:
    record = {"stage": "distill", "stage_index": 1, "step": 3, "loss": 2.0, "left_out": "a spike"}
    assert figures(record) == {"distill/loss": 2.0}
    assert figures({"stage": "distill", "loss": math.nan}) == {}
    assert figures({"calibration": [], "seconds": 3.0}) == {}
    evaluation = {"evaluation": "held_out", "step": 3, "perplexity": 4.0}
    assert figures(evaluation) == {"held_out/perplexity": 4.0}


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SupraError, match="report_to: wandb is not installed: pip install wandb"):
        refuse_missing(["wandb"])


def test_a_service_that_does_not_begin_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = list[str]()

    class Board:
        def close(self) -> None:
            closed.append("tensorboard")

    def no_key(*_: Any) -> Any:
        raise ValueError("api_key not configured\nand more")

    monkeypatch.setitem(watch._SINKS, "tensorboard", lambda *_: Board())
    monkeypatch.setitem(watch._SINKS, "wandb", no_key)
    opening = watch.sinks(["tensorboard", "wandb"], tmp_path, {}, 0)
    with pytest.raises(
        SupraError, match=r"report_to: wandb failed to start \(api_key not configured\)"
    ), opening:  # fmt: skip
        pass
    assert closed == ["tensorboard"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. And so on"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_what_takes_less_memory_is_said(
    settings: UptrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from supra_torch.uptrain import gradients as gradients_module

    def gradients(*arguments: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(gradients_module, "gradients", gradients)
    with pytest.raises(SupraError, match=r"out of memory \(.*\): set device_rows=1"):
        uptrain(settings, tmp_path / "run")


@pytest.mark.slow
def test_curves_go_to_tensorboard_and_are_taken_back(
    settings: UptrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    config = settings.model_copy(update={"report_to": ("tensorboard",), "tokens": 12 * 64})
    interrupt_at(monkeypatch, 8)
    with pytest.raises(KeyboardInterrupt):
        uptrain(config, run)
    monkeypatch.undo()
    uptrain(config, run)
    curves = EventAccumulator(str(run / "tensorboard")).Reload()
    kinds = ("transfer", "distill")
    events = [event for kind in kinds for event in curves.Scalars(f"{kind}/loss")]
    assert [event.step for event in events] == list(range(1, 13))
    assert [event.value for event in events] == pytest.approx(logged_losses(run), rel=1e-6)
    assert len(curves.Scalars("held_out/perplexity")) == 3


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C in the middle of a step of the run."""
    import os
    import signal

    calls = 0
    computed = stage_module.training_step

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGINT)
        return computed(*arguments, **options)

    monkeypatch.setattr(stage_module, "training_step", counted)


def _spoil(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """These calls of a stage's gradients return a loss that is not a number."""
    from supra_torch.uptrain import gradients as gradients_module

    calls = 0
    computed = gradients_module.gradients

    def gradients(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = computed(*arguments, **options)
        return loss * math.nan if calls in steps else loss

    monkeypatch.setattr(gradients_module, "gradients", gradients)


def test_a_step_that_is_not_finite_is_left_out(
    settings: UptrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights and the optimiser's count stay, also over a resume."""
    config = settings.model_copy(update={"tokens": 16 * 64})
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    with monkeypatch.context() as patch:
        _spoil(patch, {3, 11})
        uptrain(config, whole)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    left_out = [line for line in lines if "left_out" in line]
    assert [line["step"] for line in left_out] == [3, 11]
    assert all(line["loss"] is None for line in left_out)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 17))

    with monkeypatch.context() as patch:
        _spoil(patch, {3, 11})
        interrupt_at(patch, 12)
        with pytest.raises(KeyboardInterrupt):
            uptrain(config, resumed)
    assert checkpoint.read_place(checkpoint.newest(resumed) or resumed).left_out == 1
    uptrain(config, resumed)
    ours, theirs = weights_in(resumed / "model"), weights_in(whole / "model")
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_the_first_step_is_left_out_and_the_run_interrupted(
    settings: UptrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser has no state yet; the checkpoint says so by zeros, and the run goes on."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    with monkeypatch.context() as patch:
        _spoil(patch, {1})
        uptrain(settings, whole)
    with monkeypatch.context() as patch:
        _spoil(patch, {1})
        interrupt_at(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            uptrain(settings, resumed)
    place = checkpoint.read_place(checkpoint.newest(resumed) or resumed)
    assert (place.step, place.left_out) == (1, 1)
    uptrain(settings, resumed)
    ours, theirs = weights_in(resumed / "model"), weights_in(whole / "model")
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_too_many_in_a_row_stop_the_run(
    settings: UptrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _spoil(monkeypatch, {7, 8, 9})
    config = settings.model_copy(update={"skips": 2})
    with pytest.raises(SupraError, match=r"gives up at step 9 .*not both finite.*is kept"):
        uptrain(config, tmp_path / "run")
    assert checkpoint.read_place(checkpoint.newest(tmp_path / "run") or tmp_path).step == 6


def test_a_diverging_stage_goes_back_and_on_with_other_text(
    settings: UptrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the 21st step on the loss grows, until the run has gone back once."""
    from supra_torch.uptrain import gradients as gradients_module

    calls, places = 0, list[int]()
    computed, batch = gradients_module.gradients, Mixture.batch

    def gradients(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        loss, calls = computed(*arguments, **options), calls + 1
        return loss * 1.5 ** max(0, calls - 20) if not said else loss

    def read(self: Mixture, seen: int, *arguments: Any) -> Any:
        places.append(seen)
        return batch(self, seen, *arguments)

    monkeypatch.setattr(Mixture, "batch", read)
    said = list[str]()
    monkeypatch.setattr(gradients_module, "gradients", gradients)
    config = settings.model_copy(
        update={"stages": settings.stages[:1], "tokens": 40 * 64, "rollbacks": 1}
    )
    run = tmp_path / "run"
    summary = uptrain(config, run, say=said.append)
    assert summary["steps"] == 40 and summary["tokens"] == 40 * 64
    assert len(said) == 1 and "the loss diverges" in said[0] and "continues from step" in said[0]
    # Each step is logged once, and what it was trained on after going back is new.
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 41))
    (back,) = [record for record in records if "went_back_from" in record]
    # No text was passed over but what it diverged on, and none is read twice.
    assert places == [64 * step for step in range(calls)]
    assert back["step"] == 40 - (calls - back["went_back_from"])


@pytest.mark.slow
def test_steps_are_profiled_on_request(settings: UptrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    uptrain(settings.model_copy(update={"profile_steps": 2, "tokens": 16 * 64}), run)
    for name in ("0-transfer", "1-distill"):
        trace = json.loads((run / "profile" / f"{name}.json").read_text())
        names = {event["name"] for event in trace["traceEvents"] if "name" in event}
        assert "Optimizer.step#AdamW.step" in names
        assert "aten::mm" in (run / "profile" / f"{name}.txt").read_text()
