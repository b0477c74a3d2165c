"""What devices can do: from their makers' data sheets, and of this machine's CPU by trying."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from supra_core.errors import SupraError
from supra_core.measure.machine import processor_name

CPU = "cpu"
_SIZE, _COPIED, _SECONDS = 1024, 1 << 28, 0.5


@dataclass(frozen=True)
class Device:
    """One accelerator, or a CPU.

    ``memory`` in bytes; ``flops``: bfloat16 products a second with float32 sums, dense;
    ``float32_flops``: those of float32, which torch rounds to TF32 only where it is told to;
    ``bandwidth``: bytes a second of its memory; ``link``: bytes a second from its neighbours in a
    node; ``network``: from other nodes.
    """

    name: str
    memory: float
    flops: float
    float32_flops: float
    bandwidth: float
    link: float
    network: float
    kind: str = "cuda"

    def products(self, precision: str) -> float:
        """Operations a second in a run's precision."""
        return self.flops if precision == "bf16" else self.float32_flops


# NVLink where the usual machine has it, PCIe (32 GB/s, generation 4) elsewhere; one network
# adapter a GPU in the usual cluster (400 Gbit/s since Hopper), a shared one elsewhere.
DEVICES: dict[str, Device] = {
    "b200": Device("NVIDIA B200", 180e9, 2250e12, 75e12, 8.0e12, 900e9, 50e9),
    "h200": Device("NVIDIA H200", 141e9, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    "h100": Device("NVIDIA H100 SXM", 80e9, 989e12, 67e12, 3.35e12, 450e9, 50e9),
    "a100": Device("NVIDIA A100 SXM", 80e9, 312e12, 19.5e12, 2.04e12, 300e9, 25e9),
    "a100-40gb": Device("NVIDIA A100 SXM 40 GB", 40e9, 312e12, 19.5e12, 1.555e12, 300e9, 25e9),
    "l40s": Device("NVIDIA L40S", 48e9, 362e12, 91.6e12, 0.864e12, 32e9, 6e9),
    "a10g": Device("NVIDIA A10G", 24e9, 70e12, 35e12, 0.6e12, 32e9, 6e9),
    "l4": Device("NVIDIA L4", 24e9, 121e12, 30.3e12, 0.3e12, 32e9, 6e9),
    "rtx4090": Device("NVIDIA GeForce RTX 4090", 24e9, 165e12, 82.6e12, 1.008e12, 32e9, 3e9),
}


def device_named(name: str, precision: str) -> Device:
    """The device of that name, in whatever case; SupraError with the known ones.

    ``cpu`` is this machine's, tried for two seconds in ``precision``.
    """
    key = name.lower().replace("_", "-").replace(" ", "")
    if key == CPU:
        return _this_cpu(precision)
    if key not in DEVICES:
        known = ", ".join(DEVICES)
        raise SupraError(f"--gpu {name} is unknown: use one of {known}, or cpu for this machine")
    return DEVICES[key]


def recognised(name: str) -> Device | None:
    """The device that calls itself so, as torch tells; None for one that is not in the table."""
    words = set(name.lower().replace("rtx ", "rtx").replace("-", " ").split())
    # Two A100 differ by their memory alone.
    return next((device for key, device in DEVICES.items() if key in words), None)


def _this_cpu(precision: str) -> Device:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(2, _SIZE, _SIZE).to(dtype)
    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    flops = 2 * _SIZE**3 / _least_seconds(lambda: a @ b)
    bandwidth = 2 * _COPIED / _least_seconds(lambda: target.copy_(source))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Processes on one machine talk through its memory.
    return Device(
        processor_name(), memory, flops, flops, bandwidth, bandwidth / 2, 1e9, kind=CPU
    )  # fmt: skip


def _least_seconds(work: Callable[[], object]) -> float:
    """Of several runs, at least three: the first touches new pages."""
    runs: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(runs) < 3 or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        runs.append(time.perf_counter() - began)
    return min(runs)
