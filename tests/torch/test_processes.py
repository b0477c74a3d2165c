"""Many processes are one: the same losses, the same weights, and either goes on from the other."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from supra_core.errors import SupraError  # noqa: E402
from supra_torch.distributed.exact import clip_gradients  # noqa: E402
from supra_torch.distributed.processes import processes  # noqa: E402
from supra_torch.recipes.config import Stage, UptrainConfig  # noqa: E402
from supra_torch.run_folder import checkpoint  # noqa: E402
from supra_torch.uptrain.run import _agreed_precision  # noqa: E402
from supra_torch.uptrain.step.step import adamw  # noqa: E402
from tests.torch.uptraining import (  # noqa: E402
    end_by,
    logged_losses,
    records,
    run_in_process,
    run_in_processes,
    weights_in,
)

# Float32 sums over rows in another order. A divergence near zero is the difference of two cross
# entropies, each about ln V, and has their error.
RELATIVE, ABSOLUTE = 1e-6, 1e-6 * math.log(300)


@pytest.fixture(scope="module")
def shared(settings: UptrainConfig, documents: Path) -> UptrainConfig:
    """Four steps of four rows in each kind of stage, several documents in most rows."""
    stages = (*settings.stages, settings.stages[1].model_copy(update={"kind": "uptrain"}))
    return settings.model_copy(
        update={
            "batch_tokens": 128, "tokens": 12 * 128, "stages": stages, "data": str(documents),
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(shared: UptrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "alone"
    assert run_in_process(shared, run).wait() == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_as_many_losses_as_one(
    shared: UptrainConfig, alone: Path, tmp_path: Path, count: int
) -> None:
    run = tmp_path / "run"
    assert run_in_processes(shared, run, count).wait() == 0
    expected = logged_losses(alone)
    assert len(expected) == 12
    np.testing.assert_allclose(logged_losses(run), expected, rtol=RELATIVE, atol=ABSOLUTE)
    ours, theirs = weights_in(run / "model"), weights_in(alone / "model")
    for name, expected_weight in theirs.items():
        # AdamW's first steps have the size of the learning rate, whatever the gradient's.
        np.testing.assert_allclose(ours[name], expected_weight, rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_rows_in_segments(shared: UptrainConfig, alone: Path, tmp_path: Path) -> None:
    """Every process passes its rows' states on; all go through as many segments."""
    run = tmp_path / "run"
    cut = shared.model_copy(update={"segment_tokens": 12})
    assert run_in_processes(cut, run, 2).wait() == 0
    np.testing.assert_allclose(
        logged_losses(run), logged_losses(alone), rtol=100 * RELATIVE, atol=ABSOLUTE
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "sharded_over"), [(2, 1), pytest.param(4, 0, marks=pytest.mark.slow)]
)
def test_rows_are_shared(
    shared: UptrainConfig, alone: Path, tmp_path: Path, count: int, sharded_over: int
) -> None:
    """Two processes compute the halves of every row; with four, each two have rows of their own."""
    run = tmp_path / "run"
    together = shared.model_copy(update={"context_parallel": 2, "devices_together": sharded_over})
    assert run_in_processes(together, run, count).wait() == 0
    np.testing.assert_allclose(
        logged_losses(run), logged_losses(alone), rtol=100 * RELATIVE, atol=ABSOLUTE
    )
    for name, tolerance in (("perplexity", 1e-4), ("gradient_norm", 1e-3)):
        ours, theirs = (
            [record[name] for record in records(path) if name in record] for path in (run, alone)
        )
        np.testing.assert_allclose(ours, theirs, rtol=tolerance)
    assert [r["step_tokens"] for r in records(run) if "loss" in r] == [128] * 12


@pytest.mark.slow
def test_a_row_shared_by_another_number(shared: UptrainConfig, alone: Path, tmp_path: Path) -> None:
    """Begun with shared rows, a run goes on with whole ones."""
    run = tmp_path / "run"
    together = shared.model_copy(update={"context_parallel": 2})
    assert end_by(signal.SIGTERM, run_in_processes(together, run, 2, pause=0.1), run, 5) != 0
    assert run_in_process(shared, run).wait() == 0
    np.testing.assert_allclose(
        logged_losses(run), logged_losses(alone), rtol=100 * RELATIVE, atol=ABSOLUTE
    )


@pytest.mark.slow
def test_sharded_layers_compile(shared: UptrainConfig, alone: Path, tmp_path: Path) -> None:
    """FSDP's hooks run around the graphs, which are whole; traced, no code is generated."""
    traced = (
        "from functools import partialmethod\n"
        "from torch.nn import Module\n"
        "Module.compile = partialmethod(Module.compile, backend='aot_eager', fullgraph=True)\n"
    )
    run = tmp_path / "run"
    compiled = shared.model_copy(update={"compile": "always"})
    assert run_in_processes(compiled, run, 2, before=traced).wait() == 0
    np.testing.assert_allclose(
        logged_losses(run), logged_losses(alone), rtol=RELATIVE, atol=ABSOLUTE
    )


def test_it_goes_on_with_another_number_of_processes(
    shared: UptrainConfig, alone: Path, tmp_path: Path
) -> None:
    """Terminated in the stage of one count, it ends with another; the logs are one run's."""
    run = tmp_path / "run"
    assert end_by(signal.SIGTERM, run_in_processes(shared, run, 2, pause=0.1), run, 5) != 0
    saved = checkpoint.read_place(checkpoint.checkpoints(run)[-1])
    assert 0 < saved.stage_step < 4
    assert run_in_process(shared, run).wait() == 0
    np.testing.assert_allclose(
        logged_losses(run), logged_losses(alone), rtol=RELATIVE, atol=ABSOLUTE
    )


@pytest.mark.slow
def test_terminated_and_resumed_ends_the_same(shared: UptrainConfig, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_in_processes(shared, whole, 2).wait() == 0
    assert end_by(signal.SIGTERM, run_in_processes(shared, run, 2, pause=0.05), run, 5) != 0
    assert run_in_processes(shared, run, 2).wait() == 0
    assert logged_losses(run) == logged_losses(whole)
    ours, theirs = weights_in(run / "model"), weights_in(whole / "model")
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours[name], expected)


def test_sigterm_says_start_again(shared: UptrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert end_by(signal.SIGTERM, run_in_process(shared, run, pause=0.05), run, 5) == 75
    assert checkpoint.read_place(checkpoint.checkpoints(run)[-1]).step == len(logged_losses(run))


def test_one_precision_for_all(settings: UptrainConfig) -> None:
    """bfloat16 where all have it: others' weights would not fit together."""
    for ours, without, expected in (
        ("bf16", 0.0, "bf16"), ("bf16", 1.0, "float32"), ("float32", 2.0, "float32"),
    ):  # fmt: skip
        every = Mock(device=torch.device("cpu"))
        every.sums.return_value = [without]
        assert _agreed_precision(settings.model_copy(update={"precision": ours}), every) == expected
        every.sums.assert_called_once_with([float(ours != "bf16")])


@pytest.mark.slow
def test_what_a_stage_is_done_with_is_freed(shared: UptrainConfig, tmp_path: Path) -> None:
    """Sharded modules are cycles: the student of the stage before, and a teacher of no use."""
    before = (
        "import weakref\n"
        "from supra_torch.uptrain import stage, train\n"
        "seen = []\n"
        "def noting(make):\n"
        "    def made(*given):\n"
        "        assert not [one for one in seen if one() is not None]\n"
        "        model = make(*given)\n"
        "        seen.append(weakref.ref(model.model.layers[0].mlp.gate_proj.weight))\n"
        "        return model\n"
        "    return made\n"
        "stage.trained_student = noting(stage.trained_student)\n"
        "train.frozen_teacher = noting(train.frozen_teacher)\n"
    )
    stages = [shared.stages[2].model_copy(update={"share": share}) for share in (0.5, 0.5)]
    config = shared.model_copy(update={"stages": tuple(stages), "tokens": 4 * 128})
    assert run_in_processes(config, tmp_path / "run", 1, before=before).wait() == 0


def test_half_of_what_torchrun_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for size in (None, "1"):
        if size is not None:
            monkeypatch.setenv("WORLD_SIZE", size)
        with processes() as one:
            assert (one.size, one.mesh) == (1, None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SupraError, match="'RANK' of torchrun is missing"), processes():
        pass
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(SupraError, match="start with torchrun, or unset WORLD_SIZE"), processes():
        pass


def test_who_still_belongs_to_others_ends_at_once(tmp_path: Path) -> None:
    """With a sentence or a traceback, and nothing that would wait for the others."""
    file = tmp_path / "command.py"
    file.write_text(
        "import atexit, sys, torch.distributed as dist, typer\n"
        "from supra_cli.main import SupraGroup\n"
        "from supra_core.errors import SupraError\n"
        "app = typer.Typer(cls=SupraGroup)\n"
        "@app.command()\n"
        "def bad(): join(); raise SupraError('no room')\n"
        "@app.command()\n"
        "def broken(): join(); raise ValueError('a defect')\n"
        "def join():\n"
        "    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "    atexit.register(print, 'waited')\n"
        "app()\n"
    )
    for command, code, said in (("bad", 2, "supra: error: no room\n"), ("broken", 1, "a defect")):
        done = subprocess.run(
            [sys.executable, file, command], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout) == (code, "")
        assert said in done.stderr


def test_copies_of_a_gradient_count_once_in_its_norm() -> None:
    """Two processes hold the whole of it each."""
    both, parameter = Mock(), torch.nn.Parameter(torch.zeros(2))
    both.mesh.size.return_value = 2
    both.sums = lambda values: [2 * value for value in values]
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], 1.0, both) == 5.0
    torch.testing.assert_close(parameter.grad, torch.tensor([0.6, 0.8]))


def test_an_uneven_share_is_refused(shared: UptrainConfig) -> None:
    with pytest.raises(SupraError, match=r"4 rows of 32 .* 3 processes .* multiple of 96"):
        shared.refuse_uneven(3)


@pytest.fixture(scope="module")
def exactly(shared: UptrainConfig) -> UptrainConfig:
    """Twelve rows a step, which two, three and four processes share."""
    update = {"reduce_dtype": "float64", "batch_tokens": 384, "tokens": 6 * 384}
    return shared.model_copy(update=update)


@pytest.fixture(scope="module")
def exactly_alone(exactly: UptrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "exactly_alone"
    assert run_in_process(exactly, run).wait() == 0
    return run


@pytest.mark.parametrize(
    ("count", "together"),
    [(2, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0), (3, 0), (4, 2)))],
)
def test_sums_in_float64_do_not_show_how_many_there_are(
    exactly: UptrainConfig, exactly_alone: Path, tmp_path: Path, count: int, together: int
) -> None:
    """The same weights to the last bit, and the losses but for the order of their sum."""
    run = tmp_path / "run"
    config = exactly.model_copy(update={"devices_together": together})
    assert run_in_processes(config, run, count).wait() == 0
    ours, theirs = weights_in(run / "model"), weights_in(exactly_alone / "model")
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours[name], expected, err_msg=name)
    assert len(logged_losses(run)) == 6
    np.testing.assert_allclose(logged_losses(run), logged_losses(exactly_alone), rtol=1e-14)


def test_an_optimiser_that_is_not_fused_rounds_shards_alike() -> None:
    """Its fused form does not: the tails of tensors are rounded otherwise."""
    stage = Stage(kind="uptrain", share=1.0, learning_rate=1e-2, new_learning_rate=0.0)
    generator = torch.Generator().manual_seed(0)
    # Grouped, torch divides otherwise on a GPU; and it groups only what is not sharded.
    alone = adamw([(torch.zeros(1), 1e-2, 0.1)], stage, fused=False)
    assert alone.param_groups[0]["foreach"] is False
    for size in range(1, 60):
        whole = torch.randn(size, generator=generator)
        cut = size // 2
        groups = [[whole.clone()], [whole[:cut].clone(), whole[cut:].clone()]]
        optimisers = [adamw(((p, 1e-2, 0.1) for p in g), stage, fused=False) for g in groups]
        for _ in range(3):
            gradient = torch.randn(size, generator=generator)
            for optimiser, parameters in zip(optimisers, groups, strict=True):
                optimiser.param_groups[0]["lr"] = 1e-2
                for p, part in zip(
                    parameters, gradient.split([p.numel() for p in parameters]), strict=True
                ):
                    p.grad = part.clone()
                optimiser.step()
        assert torch.equal(groups[0][0], torch.cat(groups[1]))
