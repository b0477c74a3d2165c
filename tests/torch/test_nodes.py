"""Several nodes: one torchrun each, which meet over the network, and one run in all of them."""

from __future__ import annotations

import math
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import psutil
import pytest

torch = pytest.importorskip("torch")

from supra_torch.distributed import processes as processes_module  # noqa: E402
from supra_torch.recipes.config import UptrainConfig  # noqa: E402
from supra_torch.run_folder import checkpoint  # noqa: E402
from tests.torch.uptraining import (  # noqa: E402
    arguments,
    complete_lines,
    environment,
    logged_losses,
    run_in_process,
    script,
)

# As in test_processes: float32 sums in another order; transfer's and distill's losses near zero.
RELATIVE, ABSOLUTE = 1e-6, 1e-6 * math.log(300)


@pytest.fixture(scope="module")
def shared(settings: UptrainConfig) -> UptrainConfig:
    """Six steps of four rows in each of two stages."""
    return settings.model_copy(update={"batch_tokens": 128, "tokens": 12 * 128})


@pytest.fixture(scope="module")
def alone(shared: UptrainConfig, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    run = tmp_path_factory.mktemp("runs") / "alone"
    assert run_in_process(shared, run).wait() == 0
    return logged_losses(run)


class Nodes:
    """One torchrun a node, all on this machine; each says over which mesh its models are."""

    def __init__(
        self, settings: UptrainConfig, run: Path, count: int = 2, devices: int = 1, pause: float = 0
    ) -> None:
        file = run.with_name(f"{run.name}.py")
        file.write_text(_SAYS_MESH + script(pause))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", f"--nnodes={count}",
            f"--nproc-per-node={devices}", "--rdzv-backend=c10d", "--rdzv-id=nodes",
            f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1",
        ]  # fmt: skip
        self.logs = [run.with_name(f"{run.name}.{node}.log") for node in range(count)]
        self.all: list[Any] = []
        for node, log in enumerate(self.logs):
            hosts = f"--rdzv-conf=is_host={int(node == 0)}"
            with open(log, "w") as stream:
                self.all.append(
                    subprocess.Popen(
                        [*torchrun, hosts, str(file), *arguments(settings, run)],
                        env=environment(), stdout=stream, stderr=stream,
                    )
                )  # fmt: skip

    def wait(self) -> list[int]:
        """Exit codes, once all have ended."""
        return [process.wait(timeout=120) for process in self.all]

    def kill(self, node: int) -> None:
        """As when its power fails: torchrun and its processes at once."""
        torchrun = psutil.Process(self.all[node].pid)
        for process in (torchrun, *torchrun.children(recursive=True)):
            process.kill()

    def meshes(self) -> list[str]:
        lines = [line for log in self.logs for line in log.read_text().splitlines()]
        return [line.partition(" ")[2] for line in lines if line.startswith("mesh ")]


_SAYS_MESH = """\
from supra_torch.distributed import processes as module
make = module.init_device_mesh
def said(device, shape, **names):
    print("mesh", *shape, *names["mesh_dim_names"], flush=True)
    return make(device, shape, **names)
module.init_device_mesh = said
"""


@pytest.mark.parametrize(("together", "expected"), [(0, 2), (4, 4), (1, 1)])
def test_the_devices_of_a_node_share_a_model(
    monkeypatch: pytest.MonkeyPatch, together: int, expected: int
) -> None:
    """Two nodes of two devices; what torchrun sets is enough to see it."""
    for name, value in (("RANK", 2), ("WORLD_SIZE", 4), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(processes_module, "rendezvous", lambda _: iter([(Mock(), 2, 4)]))
    monkeypatch.setattr(processes_module, "dist", Mock())
    monkeypatch.setattr(processes_module, "mesh_over", mesh := Mock())
    with processes_module.processes(together) as one:
        assert (one.rank, one.size) == (2, 4)
    mesh.assert_called_once_with("cpu", 4, expected, two_axes=False)


@pytest.mark.slow
def test_two_nodes_are_one(shared: UptrainConfig, alone: list[float], tmp_path: Path) -> None:
    """A model is whole on each node, whose devices share it: here, on each of the two."""
    nodes = Nodes(shared, tmp_path / "run")
    assert nodes.wait() == [0, 0], nodes.logs[0].read_text()
    assert nodes.meshes() == ["2 1 replicate shard"] * 2
    assert len(alone) == 12
    losses = logged_losses(tmp_path / "run")
    np.testing.assert_allclose(losses, alone, rtol=RELATIVE, atol=ABSOLUTE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("together", "mesh"), [(0, "2 2 replicate shard"), (4, "4 shard"), (1, "4 1 replicate shard")]
)
def test_two_nodes_of_two_devices(
    shared: UptrainConfig, alone: list[float], tmp_path: Path, together: int, mesh: str
) -> None:
    """Sharded over a node's devices and replicated over nodes, or as ``devices_together`` says."""
    config = shared.model_copy(update={"devices_together": together})
    nodes = Nodes(config, tmp_path / "run", devices=2)
    assert nodes.wait() == [0, 0], nodes.logs[0].read_text()
    assert nodes.meshes() == [mesh] * 4
    losses = logged_losses(tmp_path / "run")
    np.testing.assert_allclose(losses, alone, rtol=RELATIVE, atol=ABSOLUTE)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_node(shared: UptrainConfig, alone: list[float], tmp_path: Path, lost: int) -> None:
    """The other one ends too, and started again they go on: ``lost`` 0 is where they met."""
    run = tmp_path / "run"
    nodes = Nodes(shared, run, pause=0.1)
    _wait_for_steps(nodes, run, 8)
    nodes.kill(lost)
    assert nodes.wait()[1 - lost] == 1
    assert checkpoint.read_place(checkpoint.checkpoints(run)[-1]).step in (6, 9)
    assert not (run / "summary.json").exists()
    again = Nodes(shared, run)
    assert again.wait() == [0, 0], again.logs[0].read_text()
    np.testing.assert_allclose(logged_losses(run), alone, rtol=RELATIVE, atol=ABSOLUTE)


@pytest.mark.slow
def test_one_node_is_told_to_end(shared: UptrainConfig, alone: list[float], tmp_path: Path) -> None:
    """All nodes end with a checkpoint of the same step, and go on from it."""
    run = tmp_path / "run"
    nodes = Nodes(shared, run, pause=0.1)
    _wait_for_steps(nodes, run, 7)
    nodes.all[1].send_signal(signal.SIGTERM)
    assert nodes.wait() == [1, 1]
    saved = checkpoint.read_place(checkpoint.checkpoints(run)[-1]).step
    assert saved == len(logged_losses(run)) < 12
    again = Nodes(shared, run)
    assert again.wait() == [0, 0], again.logs[0].read_text()
    np.testing.assert_allclose(logged_losses(run), alone, rtol=RELATIVE, atol=ABSOLUTE)


def _wait_for_steps(nodes: Nodes, run: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or len(complete_lines(run)) < steps:
        ended = [process.poll() for process in nodes.all]
        assert ended == [None, None], nodes.logs[0].read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
