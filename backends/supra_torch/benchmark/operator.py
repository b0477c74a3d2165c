"""Linear attention beside its peers: every implementation is checked in float64, then timed.

The decay is RetNet's, gamma = 1 - 2^(-5 - h), which all of them can compute. The algorithm's
bytes are those of one kernel run once forward and three times backward: q and the output are
read or written for H heads, k and v for K.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import torch

from supra_core.errors import SupraError
from supra_core.measure.tables import Table, milliseconds, origin
from supra_torch.benchmark.peers import CANDIDATES, CPU_SHAPES, SHAPES
from supra_torch.benchmark.problem import Problem
from supra_torch.benchmark.timing import copy_bandwidth, environment

Choice = TypeVar("Choice")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def benchmark(
    *,
    shapes: Sequence[str] | None = None,
    implementations: Sequence[str] | None = None,
    dtype: str = "bf16",
    device: str = "auto",
    repeats: int | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Every implementation on every shape; None takes all (of shapes on a CPU: the smallest).

    Returns ``rows`` (:class:`supra_torch.benchmark.problem.Row`), the measured
    ``copy_bytes_per_second``, and what they were measured with. Raises SupraError for unknown
    names or an absent device.
    """
    where = resolved_device(device)
    chosen = [_known(name, SHAPES, "shape") for name in shapes or _default_shapes(where)]
    who = [_known(name, CANDIDATES, "implementation") for name in implementations or CANDIDATES]
    kind = _known(dtype, DTYPES, "dtype")
    repeats = repeats or (100 if where.type == "cuda" else 5)
    notes = [f"{len(chosen)} of {len(SHAPES)} shapes"] if len(chosen) < len(SHAPES) else []
    if where.type == "cpu" and not shapes:
        notes = [f"on a CPU only {', '.join(CPU_SHAPES)}: name others with --shape"]
    # First: a kernel that reads where it must not leaves a GPU unusable.
    copied = copy_bandwidth(where)
    rows = []
    for shape in chosen:
        problem = Problem(shape, kind, where)
        for candidate in who:
            log(f"{shape.name}: {candidate.name}")
            rows.append(problem.measure(candidate, repeats))
    return {
        "benchmark": "op",
        "dtype": dtype,
        "repeats": repeats,
        "copy_bytes_per_second": copied,
        **environment(where),
        "rows": [asdict(row) for row in rows],
        "notes": notes,
    }


def resolved_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one; SupraError if the device named is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SupraError(f"--device '{name}' is unknown: use auto, cuda or cpu") from None
    if device.type not in ("cuda", "cpu"):
        raise SupraError(f"--device '{name}' cannot be measured: use auto, cuda or cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SupraError(f"--device {name}: torch finds no CUDA device here, use --device cpu")
    return device


def _known(name: str, choices: Mapping[str, Choice], what: str) -> Choice:
    if name not in choices:
        raise SupraError(f"--{what} '{name}' is unknown: use one of {', '.join(choices)}")
    return choices[name]


def _default_shapes(device: torch.device) -> Sequence[str]:
    return CPU_SHAPES if device.type == "cpu" else tuple(SHAPES)


def table(result: dict[str, Any]) -> Table:
    """The result for people; the share of a copy says how near the memory's speed it is."""
    copied = result["copy_bytes_per_second"]
    rows = []
    for row in result["rows"]:
        errors = row["errors"]
        rows.append(
            (
                row["shape"],
                row["implementation"],
                "-" if errors is None else f"{max(errors.values()):.1e}",
                milliseconds(row["forward_seconds"]),
                milliseconds(row["forward_backward_seconds"]),
                _share(row["forward_bytes_per_second"], copied),
                _share(row["forward_backward_bytes_per_second"], copied),
                row["reason"] or "",
            )
        )
    return Table(
        title=f"Linear attention, {result['dtype']}: {origin(result)}",
        columns=(
            "shape", "implementation", "error", "forward, ms", "and backward, ms",
            "forward, of a copy", "both, of a copy", "",
        ),
        rows=rows,
        notes=(
            *result["notes"],
            "error: the largest of output, dq, dk and dv, relative to float64, root mean square, "
            "over a few heads; what exceeds its type's tolerance is not timed",
            f"times are medians of {result['repeats']} calls; "
            "sdpa is softmax attention, another function of the same operands",
            "of a copy: bytes/s against a measured copy, where forward has to read q, k, v and "
            "write the output once, and forward with backward four times as much",
        ),
    )  # fmt: skip


def _share(rate: float | None, copied: float) -> str:
    return "-" if rate is None else f"{100 * rate / copied:.1f} %"
