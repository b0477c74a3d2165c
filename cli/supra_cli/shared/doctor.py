"""What this machine can run: versions, accelerators, memory, and the speed of bfloat16."""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from supra_cli.shared.output import log
from supra_core.errors import install

_PACKAGES = {
    "supra": "supra-lm",
    "torch": "torch",
    "triton": "triton",
    "transformers": "transformers",
    "mlx": "mlx",
    "mlx_lm": "mlx-lm",
    "tokenizers": "tokenizers",
    "numpy": "numpy",
    "lm_eval": "lm-eval",
}
_MATMUL_SIZE = 1024


def examine() -> dict[str, Any]:
    """Facts by name, None if absent. Runs short matrix products."""
    return machine() | _torch_facts() | _mlx_facts()


def machine() -> dict[str, Any]:
    """The system and the versions of packages, which are not imported."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": _memory_gib(),
    }
    return facts | {name: _version(package) for name, package in _PACKAGES.items()}


def advice(facts: dict[str, Any]) -> list[str]:
    """What to install, and what to expect."""
    hints = []
    if facts["torch"] is None:
        hints.append(f"Uptraining needs torch: {install('torch')}")
    if facts["mlx_lm"] is None:
        hints.append(f"On-device inference is fastest with MLX: {install('mlx')}")
    elif facts["mlx_device"] is None:
        hints.append(f"mlx is installed without a working backend: {install('mlx')}")
    if facts["cuda"] and facts["triton"] is None:
        hints.append("The GPU kernels need triton: pip install triton")
    if facts["torch"] is not None and not facts["cuda"]:
        speedup = facts["bf16_speedup"]
        if speedup is not None and speedup < 1:
            hints.append(
                f"bfloat16 runs at {speedup:g} times float32's speed on this CPU: uptrain with "
                "--set precision=float32"
            )
        hints.append("No CUDA device: uptraining runs on the CPU, which suits small models only")
    return hints or ["Everything is installed."]


def kernels() -> list[dict[str, Any]] | None:
    """MLX's kernel compared with the operations it replaces, by shape; None without Metal."""
    if _mlx_facts()["mlx_device"] != "metal":
        return None
    from supra_mlx.selftest import as_records, compare_metal

    return as_records(compare_metal())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _torch_facts() -> dict[str, Any]:
    if importlib.util.find_spec("torch") is None:
        return {"cuda": None, "bf16_speedup": None}
    import torch

    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {memory:.0f} GiB"
        return {"cuda": name, "bf16_speedup": None}
    slow = _matmul_seconds(torch.float32)
    return {"cuda": None, "bf16_speedup": round(slow / _matmul_seconds(torch.bfloat16), 1)}


def _matmul_seconds(dtype: Any) -> float:
    import torch

    a = torch.ones(_MATMUL_SIZE, _MATMUL_SIZE, dtype=dtype)
    a @ a  # the first product pays for setting up
    start = time.perf_counter()
    for _ in range(3):
        a @ a
    return time.perf_counter() - start


def _mlx_facts() -> dict[str, Any]:
    if importlib.util.find_spec("mlx") is None:
        return {"mlx_device": None}
    try:
        import mlx.core as mx
    except ImportError as error:
        log(f"supra: mlx cannot be imported: {error}")
        return {"mlx_device": None}
    return {"mlx_device": "metal" if mx.metal.is_available() else "cpu"}
