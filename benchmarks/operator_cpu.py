"""Linear attention on a CPU: forward + backward times and peak memory beside softmax attention.

One layer of SmolLM2-135M (9 query heads, 3 key/value heads, values of 64 channels):

- ``sdpa``: torch's causal scaled_dot_product_attention, 64 channels, what transformers trains with
- ``dense``: linear attention with all T x T weights, 64 channels
- ``paper``: the chunked form, 64 channels, fixed decay
- ``windowed far``: the chunked form, 128 features, learned decay, divided by the sum
- ``windowed``: windowed attention, 64 tokens of softmax over that

    python benchmarks/operator_cpu.py --json operator_cpu.json

Times are medians. Memory is the peak of the process above what it held before it made its
inputs, so inputs, output and all gradients count; Linux only, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from supra_core.measure.machine import processor_name, today, versions
from supra_torch.ops import windowed_attention
from supra_torch.ops.linear_attention import linear_attention_with_sums
from supra_torch.uptrain.memory import peak_memory, reset_peak

HEADS, KEY_HEADS, SIZE, WINDOW = 9, 3, 64, 64
OPERATORS = ("sdpa", "dense", "paper", "windowed far", "windowed")
SHAPES = ((4, 512), (1, 2048), (4, 2048))
LENGTHS = (1024, 4096, 16384, 65536)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# The dense form holds all weights at once, several GB beyond so many tokens.
DENSE_TOKENS = 2048
# Lengths to measure the memory of; with the quadratic forms longer ones take GBs, or minutes.
LONGEST = {"dense": 4096, "sdpa": 16384}


def forward_backward(
    operator: str, batch: int, tokens: int, dtype: torch.dtype
) -> Callable[[], Any]:
    """One training step of the operator: output and all gradients, for random inputs."""
    generator = torch.Generator().manual_seed(0)

    def leaf(heads: int, channels: int) -> torch.Tensor:
        x = torch.randn(batch, tokens, heads, channels, generator=generator)
        return x.to(dtype).requires_grad_()

    q, k, v = leaf(HEADS, SIZE), leaf(KEY_HEADS, SIZE), leaf(KEY_HEADS, SIZE)
    gradient = leaf(HEADS, SIZE).detach()
    decay = torch.linspace(0.9, 0.999, HEADS, dtype=torch.float64)
    inputs = [q, k, v]
    if operator.startswith("windowed"):
        phi_q, phi_k = (
            leaf(heads, 2 * SIZE).detach().abs_().requires_grad_() for heads in (HEADS, KEY_HEADS)
        )
        decay.requires_grad_()
        gain = torch.zeros(HEADS, requires_grad=True)
        inputs = [phi_q, phi_k, v, decay] + ([q, k, gain] if operator == "windowed" else [])

    def output() -> torch.Tensor:
        if operator == "sdpa":
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
            return out.transpose(1, 2)
        if operator == "windowed":
            return windowed_attention(q, k, v, phi_q, phi_k, decay, gain, WINDOW)[0]
        if operator == "windowed far":
            return linear_attention_with_sums(
                phi_q, phi_k, v, decay, normalise=True, implementation="chunked"
            )[0]
        return linear_attention_with_sums(
            q, k, v, decay, normalise=False,
            implementation="reference" if operator == "dense" else "chunked",
        )[0]  # fmt: skip

    return lambda: torch.autograd.grad(output(), inputs, gradient)


def seconds(step: Callable[[], Any], repeats: int) -> float:
    """The median of ``repeats`` runs, after two that do not count."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def own_peak_bytes(operator: str, tokens: int, dtype: torch.dtype) -> int:
    """What one step takes in this process, its inputs included."""
    device = torch.device("cpu")
    # Right after the peak is reset, it is what is resident now.
    reset_peak(device)
    before = peak_memory(device)
    forward_backward(operator, 1, tokens, dtype)()
    return peak_memory(device) - before


def peak_bytes(operator: str, tokens: int, dtype: str) -> int:
    """:func:`own_peak_bytes` of a process of its own."""
    command = [sys.executable, __file__, "--peak", operator, str(tokens), dtype]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(repeats: int) -> dict[str, Any]:
    """All times in ms and all peaks in MB, with the machine and the versions."""
    times = []
    for dtype in TYPES:
        for batch, tokens in SHAPES:
            row: dict[str, Any] = {"dtype": dtype, "batch": batch, "tokens": tokens}
            for operator in OPERATORS:
                if operator != "dense" or batch * tokens <= DENSE_TOKENS:
                    step = forward_backward(operator, batch, tokens, TYPES[dtype])
                    row[operator] = round(1e3 * seconds(step, repeats), 1)
            times.append(row)
    peaks = []
    for dtype in TYPES:
        for tokens in LENGTHS:
            row = {"dtype": dtype, "batch": 1, "tokens": tokens}
            for operator in OPERATORS:
                if tokens <= LONGEST.get(operator, tokens):
                    row[operator] = round(peak_bytes(operator, tokens, dtype) / 1e6)
            peaks.append(row)
    return {
        "date": today(),
        "machine": f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": versions("torch"),
        "repeats": repeats,
        "milliseconds": times,
        "peak_megabytes": peaks,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a dash where nothing was measured."""
    columns = ["dtype", "batch", "tokens", *OPERATORS]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(str(row.get(c, "—")) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Linear attention on a CPU: times and memory.")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--repeats", type=int, default=15, help="runs a time is the median of")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        operator, tokens, dtype = arguments.peak
        print(own_peak_bytes(operator, int(tokens), TYPES[dtype]))
        return
    result = measure(arguments.repeats)
    print(f"{result['machine']}, torch {torch.__version__}, {result['date']}\n")
    print(f"Forward + backward, ms\n\n{table(result['milliseconds'])}\n")
    print(f"Peak memory, MB\n\n{table(result['peak_megabytes'])}")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
