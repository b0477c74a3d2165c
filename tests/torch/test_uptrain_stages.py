"""What a stage trains, and by what schedule."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from supra_core.errors import SupraError  # noqa: E402
from supra_core.sources.source import open_source  # noqa: E402
from supra_torch.recipes.config import UptrainConfig, recipe_names, resolve  # noqa: E402
from supra_torch.run_folder import checkpoint  # noqa: E402
from supra_torch.uptrain import evaluation  # noqa: E402
from supra_torch.uptrain.run import uptrain  # noqa: E402
from supra_torch.uptrain.step.stages import _mean_square  # noqa: E402
from supra_torch.uptrain.step.step import learning_rate_factor  # noqa: E402
from tests.torch.uptraining import (  # noqa: E402
    SETTINGS,
    end_by,
    logged_losses,
    records,
    run_in_process,
    weights_in,
)

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
    uptrain(low_rank, run)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record.get("stage") == "distill"]
    assert losses[-1] < losses[0]
    trained, source = weights_in(run / "model"), open_source(low_rank.model)
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


@pytest.mark.slow
def test_adapters_resume_to_the_last_bit(low_rank: UptrainConfig, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_in_process(low_rank, whole).wait() == 0
    process = run_in_process(low_rank, killed, pause=0.05)
    # In the second stage, after a checkpoint with adapters.
    end_by(signal.SIGKILL, process, killed, 16)
    assert (checkpoint.checkpoints(killed)[-1] / "adapters").is_dir()
    assert run_in_process(low_rank, killed).wait() == 0
    assert logged_losses(killed) == logged_losses(whole)
    ours, theirs = weights_in(killed / "model"), weights_in(whole / "model")
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours[name], expected)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid(name: str) -> None:
    config = resolve(config=None, model="m", recipe=name, data="d", overrides={"tokens": "10_000"})
    assert sum(config.stage_steps()) >= len(config.stages)


def test_the_learning_rate_rises_then_falls() -> None:
    factors = [learning_rate_factor(step, 100, 0.1, 0.1) for step in range(100)]
    assert factors[0] == pytest.approx(1 / 11)
    assert max(factors) == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.1 <= factors[-1] < 0.11


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
    losses = logged_losses(run)
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
    for checkpointing in (False, True, 2):
        run = tmp_path / str(checkpointing)
        uptrain(
            paper.model_copy(update={"tokens": 256, "activation_checkpointing": checkpointing}), run
        )
        losses.append(logged_losses(run))
    # The same operations in the same order; threads may sum in another.
    np.testing.assert_allclose(losses[1:], [losses[0]] * 2, rtol=1e-5)


def test_a_stage_must_have_something_to_train(settings: UptrainConfig, tmp_path: Path) -> None:
    with pytest.raises(SupraError, match="are both 0: set one of them"):
        resolve(
            config=None, model="m", recipe=None, data="d",
            overrides={"stages.0.learning_rate": "0.0", "stages.0.new_learning_rate": "0.0"},
        )  # fmt: skip
    softmax = settings.linearize.model_copy(update={"keep_softmax": (0, 1)})
    with pytest.raises(SupraError, match="`keep_softmax` names all 2 layers"):
        uptrain(settings.model_copy(update={"linearize": softmax}), tmp_path / "run")


def test_frozen_parts_stay_as_they_are(settings: UptrainConfig, tmp_path: Path) -> None:
    distill = settings.stages[1].model_copy(update={"freeze": ("embeddings", "norms")})
    config = settings.model_copy(update={"tokens": 256, "stages": (distill,)})
    uptrain(config, tmp_path / "run")
    before = {name: t.read() for name, t in open_source(config.model).tensors.items()}
    after = weights_in(tmp_path / "run" / "model")
    changed = {name for name, value in before.items() if not np.array_equal(after[name], value)}
    assert changed == {name for name in before if ".mlp." in name or ".self_attn." in name}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= before.keys() - changed


def test_a_rows_scale_does_not_show_how_many_threads_there_are() -> None:
    """Large enough to be shared; torch's own float32 sum of one row does show it."""
    x = torch.randn(1, 256, 512, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found.append(_mean_square(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0], x.double().square().mean((1, 2), keepdim=True).float())


def test_an_unknown_part_is_named() -> None:
    with pytest.raises(SupraError, match=r"stages\.1\.freeze\.0: input should be 'embeddings'"):
        resolve(
            config=None, model="m", recipe=None, data="d",
            overrides={"stages.1.freeze": '["heads"]'},
        )  # fmt: skip


def test_a_perplexity_is_measured_once(
    paper: UptrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def count(*given: Any) -> float:
        counted.append(given)
        return measured(*given)

    measured = evaluation.held_out_perplexity
    monkeypatch.setattr(evaluation, "held_out_perplexity", count)
    run = tmp_path / "run"
    uptrain(paper.model_copy(update={"tokens": 128, "evaluate_every": 1}), run)
    # The teacher's, the untrained model's, and one after each of two steps.
    assert len(counted) == 4
    counted.clear()

    def interrupted(stage: str, done: int, total: int, **figures: float) -> None:
        if stage == "uptrain":
            raise KeyboardInterrupt

    run = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        uptrain(paper.model_copy(update={"tokens": 128}), run, progress=interrupted)
    summary = uptrain(paper.model_copy(update={"tokens": 128}), run)
    # Of these the run that goes on adds the last step's alone.
    assert len(counted) == 3
    assert summary["teacher_held_out_perplexity"] == measured_teacher(run)


def measured_teacher(run: Path) -> float:
    (found,) = [r["teacher_perplexity"] for r in records(run) if "teacher_perplexity" in r]
    return float(found)


def test_what_cannot_be_captured_is_computed_anyway() -> None:
    from supra_torch.uptrain.step.batches import Batch
    from supra_torch.uptrain.step.capture import CapturedGradients

    if torch.cuda.is_available():
        pytest.skip("a CUDA device captures it")
    weight, said = torch.nn.Parameter(torch.ones(3)), list[str]()

    def compute(batches: Any) -> Any:
        loss = (weight * batches[0].ids).sum()
        loss.backward()
        return loss.detach()

    captured = CapturedGradients(compute, [weight], said.append)
    for _ in range(2):
        assert captured([Batch(torch.arange(3.0), torch.tensor([0, 3]))]) == 3.0
        assert weight.grad is not None and weight.grad.tolist() == [0.0, 1.0, 2.0]
        weight.grad = None
    assert len(said) == 1 and "CUDA graph" in said[0]
