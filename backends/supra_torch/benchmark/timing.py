"""Median times, a device's copy bandwidth, and what a measurement must say about its machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from supra_core.measure.machine import processor_name, today, versions

# More than any GPU's L2 cache holds (H100: 50 MB, B200: 126 MB).
_FLUSH_BYTES = 256 * 2**20
_COPY_BYTES = {"cuda": 2**30, "cpu": 256 * 2**20}
_WARMUP = 3


def median_seconds(
    run: Callable[[], object],
    device: torch.device,
    repeats: int,
    *,
    flush: bool = True,
    warmup: int = _WARMUP,
) -> float:
    """The median time of ``run`` over ``repeats`` calls, after ``warmup`` unmeasured ones.

    On CUDA by events around each call, with the L2 cache overwritten between calls unless
    ``flush`` is False; elsewhere by the host's clock.
    """
    for _ in range(warmup):
        run()
    if device.type != "cuda":
        return statistics.median(_host_seconds(run) for _ in range(repeats))
    with torch.cuda.device(device):
        cache = torch.empty(_FLUSH_BYTES if flush else 0, dtype=torch.uint8, device=device)
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        for start, end in events:
            cache.zero_()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def copy_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes/s of a large copy on the device, those read and those written together."""
    count = _COPY_BYTES["cuda" if device.type == "cuda" else "cpu"]
    source = torch.zeros(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / median_seconds(lambda: target.copy_(source), device, repeats)


def environment(device: torch.device) -> dict[str, Any]:
    """The device, how many threads a CPU had, the versions, and the date (UTC)."""
    packages = ("torch", "transformers", "triton", "flash-linear-attention")
    return {
        "device": device_name(device),
        "threads": None if device.type == "cuda" else torch.get_num_threads(),
        "versions": versions(*packages),
        "date": today(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


def _host_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
