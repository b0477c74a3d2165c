"""Memory of a training process: its peak, and that glibc keeps what is freed."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from supra_core.errors import SupraError

# Numbers of mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed, for the rest of the process; whether it could.

    A step on a CPU allocates gigabytes. Returned to the system and asked for again, every page
    faults and is zeroed anew, each step (PyTorch's tuning guide recommends another allocator for
    this; glibc's own can be told).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_THRESHOLD, _MOST) and libc.mallopt(_M_TRIM_THRESHOLD, _MOST))


@contextmanager
def memory_errors(run: Path) -> Iterator[None]:
    """Inside, running out of memory is a SupraError that names settings which need less."""
    try:
        yield
    except RuntimeError as error:
        # A CPU's allocator raises nothing of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        said = str(error).strip().split("\n")[0].split(". ")[0]
        raise SupraError(
            f"{run}: out of memory ({said}): set device_rows=1, "
            "activation_checkpointing=true, segment_tokens or, on several GPUs, context_parallel; "
            "run again to resume from the last checkpoint; supra plan shows what each setting takes"
        ) from None


def reset_peak(device: torch.device) -> None:
    """Forget what loading the weights needed, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        # Containers may forbid it.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocations, or of this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text("ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
