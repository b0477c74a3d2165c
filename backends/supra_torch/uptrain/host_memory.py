"""The host's memory between steps: kept by the process, not returned and asked for again."""

from __future__ import annotations

import ctypes
import platform

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
