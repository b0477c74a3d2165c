"""A run that is killed again and again, at random moments and by random means.

:func:`main` runs in a process of its own, with the runs' folder on a small disk of its own where
the system allows one, where a full disk is a full disk. Processes are forked from one that has
imported everything, so that a start takes a second; what torchrun sets, and its store, they find
as usual.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from supra_core.artifact import folder as artifact
from supra_core.formats import checksums, distributed
from tests.torch.uptraining import records, weights_in

_CONTEXT: Any = multiprocessing.get_context("forkserver")
_PRELOADED = [
    "supra_cli.main", "supra_cli.shared.progress", "supra_torch.uptrain.run",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint.state_dict_saver", "torch._dynamo", "tests.torch.storm",
]  # fmt: skip
# A process that has nothing to wait for ends long before.
_PATIENCE = 60.0
_BAD_INPUT, _START_AGAIN = 2, 75
_SENTENCE = "supra: error: "
# What differs from one run to the next.
_TIMES = {"seconds", "tokens_per_second", "data_seconds", "memory_bytes"}
# Moments that a start which goes on with a run may be past before its processes have joined.
_EARLY = {"time", "data", "calibrating"}
# How long torchrun waits after SIGTERM is set to here.
_GRACE = 10.0
# Steps before each stage, and in all; of the config in test_kills.
_BEFORE = (0, 20, 40, 80)


def work(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """One process: ``supra`` with what torchrun would have set, its output in a file."""
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    import torch

    from supra_cli.main import app

    torch.set_num_threads(1)
    app(arguments, prog_name="supra")


class Group:
    """The processes of one start."""

    def __init__(self, config: Path, run: Path, count: int, logs: Path) -> None:
        import torch.distributed as dist

        self.logs = [logs / f"{rank}.log" for rank in range(count)]
        for log in self.logs:
            log.unlink(missing_ok=True)
        environment: dict[str, str] = {}
        if count > 1:
            self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            environment = {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self._store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
            }  # fmt: skip
        arguments = ["uptrain", str(config), "--out", str(run)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
            process = _CONTEXT.Process(target=work, args=(arguments, environment | own, str(log)))
            process.start()
            self.processes.append(process)

    @property
    def is_running(self) -> bool:
        return any(process.exitcode is None for process in self.processes)

    def send(self, number: signal.Signals, ranks: list[int] | None = None) -> None:
        for rank, process in enumerate(self.processes):
            if (ranks is None or rank in ranks) and process.exitcode is None:
                os.kill(process.pid, number)

    def codes(self) -> list[int]:
        """Exit codes; all processes end by themselves."""
        deadline = time.monotonic() + _PATIENCE
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        if self.is_running:
            said = self.said
            self.send(signal.SIGKILL)
            raise AssertionError(f"a process did not end:\n{said}")
        return [process.exitcode for process in self.processes]

    def ended_by_torchrun(self) -> None:
        """After one has died: those that do not notice, since they had not joined, are told."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            until = time.monotonic() + _GRACE
            for process in self.processes:
                process.join(max(0.0, until - time.monotonic()))
            self.send(number)

    @property
    def said(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())


class Disk:
    """Where the run is, and how to fill it up."""

    def __init__(self, folder: Path, is_own: bool) -> None:
        self.folder, self.is_own = folder, is_own
        self._ballast = folder / "ballast"

    def fill(self, group: Group | None = None, but: int = 0) -> None:
        """Leave ``but`` bytes; on a disk that is not its own, no file of the group may grow."""
        if not self.is_own:
            assert group is not None
            for process in group.processes:
                if process.exitcode is None:
                    limits = (random.randrange(16_384, 65_536), resource.RLIM_INFINITY)
                    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)
            return
        with open(self._ballast, "ab") as file:
            while (free := self.free() - but) > 0:
                try:
                    os.posix_fallocate(file.fileno(), file.tell(), free)
                except OSError:
                    continue  # Someone else was faster.
                file.seek(0, os.SEEK_END)

    def free(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_bsize

    def make_room(self) -> None:
        self._ballast.unlink(missing_ok=True)


@dataclass(frozen=True)
class Kill:
    """When and how; ``moment`` names an event or is "time"."""

    moment: str
    means: str


class Storm:
    """Kills a run as planned and looks after every kill whether what is left is whole."""

    def __init__(self, config: Path, disk: Disk, logs: Path, seed: int) -> None:
        self.config, self.disk, self.logs = config, disk, logs
        self.random = random.Random(seed)
        self.happened: list[str] = []

    def run(self, run: Path, counts: Iterator[int], kills: list[Kill]) -> None:
        """All kills, then to the end."""
        reached = -1
        for kill in kills:
            group = Group(self.config, run, next(counts), self.logs)
            self._wait(kill, run, group)
            finished = not group.is_running
            self.happened.append(f"{kill.means} {len(group.processes)} at {kill.moment}")
            self._strike(kill, run, group)
            reached = self._look(run, reached)
            self.happened[-1] += f" after {reached}"
            if kill.moment == "model":
                # It may have been faster: then as if it had been killed just before its end.
                (run / "summary.json").unlink(missing_ok=True)
            else:
                assert not finished, group.said
        group = Group(self.config, run, next(counts), self.logs)
        assert group.codes() == [0] * len(group.processes), group.said
        self._look(run, reached)

    def _wait(self, kill: Kill, run: Path, group: Group) -> None:
        """Until the moment, or until the run has ended."""
        logged, since = _steps(run), time.monotonic()
        more, seconds = self.random.randint(1, 4), self.random.uniform(0, 1.5)
        ends = next(end for end in _BEFORE if end > logged or end == _BEFORE[-1])
        before = set(run.glob(".model.*.partial"))

        def has_stepped(steps: int) -> bool:
            return _steps(run) >= logged + steps

        is_there: dict[str, Callable[[], bool]] = {
            "time": lambda: time.monotonic() > since + seconds or has_stepped(more),
            "data": lambda: (run / "data").exists(),
            "calibrating": lambda: (run / "data" / "data.json").is_file(),
            "steps": lambda: has_stepped(more),
            "saving": lambda: has_stepped(1) and _any(run, ".step_*.partial"),
            "between stages": lambda: has_stepped(1 if ends == _BEFORE[-1] else ends - logged),
            "model": lambda: bool(set(run.glob(".model.*.partial")) - before),
        }
        arrived = is_there[kill.moment]
        while group.is_running and not arrived():
            time.sleep(0.001)
        span = {"calibrating": 0.3, "between stages": 0.2, "steps": 0.05}
        time.sleep(self.random.uniform(0, span.get(kill.moment, 0.01)))

    def _strike(self, kill: Kill, run: Path, group: Group) -> None:
        steps, means = _steps(run), kill.means
        # The end may come first.
        done = [0] * len(group.processes) if kill.moment == "model" else None
        if means == "kill all":
            group.send(signal.SIGKILL)
            group.codes()
        elif means == "kill one":
            rank = self.random.randrange(len(group.processes))
            group.send(signal.SIGKILL, [rank])
            told: set[int] = set()
            if kill.moment in _EARLY:
                group.ended_by_torchrun()
                told = {-signal.SIGTERM, -signal.SIGKILL, _START_AGAIN}
            codes = group.codes()
            others = [code for other, code in enumerate(codes) if other != rank]
            if told & set(others):
                assert set(others) <= {*told, _BAD_INPUT}, (codes, group.said)
            elif codes[rank] == -signal.SIGKILL and codes != done and 0 not in others:
                assert all(code == _BAD_INPUT for code in others), (codes, group.said)
                assert group.said.count(_SENTENCE) == bool(others), group.said
            else:
                assert done, codes
        elif means == "terminate":
            group.send(signal.SIGTERM)
            codes = group.codes()
            # Before the run has begun, a process ends as any other does.
            begun = bool(steps) and kill.moment not in _EARLY
            expected = {_START_AGAIN} if begun else {_START_AGAIN, -signal.SIGTERM}
            if done:
                # One may be past the end when another is told to.
                expected |= {0}
            assert set(codes) <= expected, (codes, group.said)
        else:
            self.disk.fill(group)
            codes = group.codes()
            if codes != done:
                assert codes == [_BAD_INPUT] * len(codes), (codes, group.said)
                _assert_said(group.said)
            self.disk.make_room()
        # A signal inside a finaliser is reported so by Python, and heeded at a next step.
        swallowed = means == "terminate" and "Exception ignored in" in group.said
        assert "Traceback" not in group.said or swallowed, group.said

    def _look(self, run: Path, reached: int) -> int:
        """Every checkpoint that looks complete is; the newest one is never older than before."""
        newest = max((_checked(c) for c in (run / "checkpoints").glob("step_*")), default=-1)
        assert newest >= reached
        return newest


def _assert_said(said: str) -> None:
    assert said.count(_SENTENCE) == 1, said
    (sentence,) = (line for line in said.splitlines() if line.startswith(_SENTENCE))
    assert "could not be written (" in sentence, said
    assert "make room and start again" in sentence, said


def _any(run: Path, pattern: str) -> bool:
    return any((run / "checkpoints").glob(pattern))


def _steps(run: Path) -> int:
    """The last step that is logged."""
    file = run / "metrics.jsonl"
    try:
        lines = [line for line in file.read_text().splitlines() if '"loss"' in line]
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError):
        return 0


def _checked(checkpoint: Path) -> int:
    """The checkpoint's step, when it is whole."""
    place = json.loads((checkpoint / "state.json").read_text())
    model = artifact.read(checkpoint / "model")
    assert place["step"] == int(checkpoint.name.removeprefix("step_"))
    assert place["step"] == _BEFORE[place["stage"]] + place["stage_step"]
    assert model.spec.provenance.trained_tokens == place["tokens"] == place["step"] * 128
    assert (checkpoint / "model" / "tokenizer.json").stat().st_size
    own = {name: tensor.read() for name, tensor in model.tensors.items()}
    assert all(np.isfinite(array).all() for array in own.values())
    kinds = {path.name for path in checkpoint.iterdir()} - {"model", "state.json", checksums.NAME}
    for sums in checkpoint.rglob(checksums.NAME):
        assert checksums.check(sums.parent).passed
    if not place["stage_step"]:
        assert not kinds
        return int(place["step"])
    assert kinds == ({"optimiser", "adapters"} if place["stage"] == 2 else {"optimiser"})
    adapters = {}
    if "adapters" in kinds:
        adapters = distributed.read_folder(checkpoint / "adapters")
    moments = distributed.read_folder(checkpoint / "optimiser")
    assert moments
    for name, tensor in moments.items():
        parameter, moment = name.rsplit("/", 1)
        assert moment in ("exp_avg", "exp_avg_sq")
        named = parameter.replace(".base.", ".")
        shape = adapters[parameter].shape if parameter in adapters else own[named].shape
        assert tensor.shape == shape
        assert np.isfinite(tensor.read()).all()
    return int(place["step"])


def plan(kills: int, several: bool, seed: int) -> list[Kill]:
    """Moments early in a run first, then any, then those at its end; means at random."""
    chosen = random.Random(seed)
    early = ["time", "data", "calibrating", "calibrating"]
    late = ["model", "model"]
    middle = ["saving", "steps", "time", "saving", "between stages", "steps", "saving"]
    moments = early + [*cycle_of(middle, kills - len(early) - len(late))] + late
    means = ["kill all", "terminate", "full disk", *(["kill one"] if several else [])]
    drawn = [*cycle_of(means, kills)]
    chosen.shuffle(drawn)
    return [Kill(moment, how) for moment, how in zip(moments, drawn, strict=True)]


def cycle_of(values: list[str], count: int) -> Iterator[str]:
    """The values again and again, ``count`` in all."""
    repeated = cycle(values)
    return (next(repeated) for _ in range(count))


def compared(ours: Path, theirs: Path) -> float:
    """The largest ||difference|| / ||weight|| of any tensor."""
    mine, expected = weights_in(ours / "model"), weights_in(theirs / "model")
    assert mine.keys() == expected.keys()
    return max(
        float(np.linalg.norm(mine[name] - array) / np.linalg.norm(array))
        for name, array in expected.items()
    )


def without_times(run: Path) -> list[dict[str, Any]]:
    """The log, but for how long things took."""
    return [
        {key: value for key, value in record.items() if key not in _TIMES}
        for record in records(run)
    ]


def whole(config: Path, run: Path, count: int, logs: Path) -> None:
    """A run that nobody disturbs."""
    group = Group(config, run, count, logs)
    assert group.codes() == [0] * count, group.said


def main(file: str) -> None:
    """The storms of a plan, each against the run that nobody disturbed."""
    instructions = json.loads(Path(file).read_text())
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    disk = Disk(Path(instructions["disk"]), instructions["is_own"])
    logs, config = Path(instructions["logs"]), Path(instructions["config"])
    for counts, kills, seed in instructions["storms"]:
        began = time.monotonic()
        expected, run = disk.folder / "whole", disk.folder / "run"
        whole(config, expected, counts[0], logs)
        took = time.monotonic() - began
        storm = Storm(config, disk, logs, seed)
        try:
            storm.run(run, cycle(counts), plan(kills, len(counts) > 1 or counts[0] > 1, seed))
        finally:
            print(counts, storm.happened, flush=True)
        steps = [record["step"] for record in records(run) if "loss" in record]
        assert steps == list(range(1, len(steps) + 1)), steps
        difference = compared(run, expected)
        if len(counts) == 1:
            assert without_times(run) == without_times(expected)
            assert difference == 0
        assert difference <= instructions["tolerance"], difference
        print(
            f"{counts} processes: {kills} kills, {time.monotonic() - began:.0f} s "
            f"({took:.1f} s undisturbed), weights differ by {difference:.1e}",
            flush=True,
        )
        for folder in (expected, run):
            shutil.rmtree(folder)
