"""Profiles of the first steps of each stage: which operators take the time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

# Compiling, filling caches and allocating fall on the first steps.
_WARMUP = 3
_ROWS = 40


@contextmanager
def profiled(folder: Path, name: str, steps: int) -> Iterator[Callable[[], None]]:
    """Yields what to call after every step; ``steps`` of them are profiled (0: none).

    Writes ``folder``/``name``.json, a trace for chrome://tracing or Perfetto, and ``name``.txt, the
    operators that take longest: https://docs.pytorch.org/docs/stable/profiler.html
    """
    if steps == 0:
        yield lambda: None
        return

    def write(found: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(folder / f"{name}.json"))
        order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=_ROWS)
        (folder / f"{name}.txt").write_text(table, encoding="utf-8")

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    plan = schedule(wait=_WARMUP - 1, warmup=1, active=steps, repeat=1)
    with profile(activities=activities, schedule=plan, on_trace_ready=write) as running:
        yield running.step
