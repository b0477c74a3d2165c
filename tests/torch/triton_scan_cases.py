"""The Triton kernel in the interpreter; run with TRITON_INTERPRET=1, prints ``passed N``.

A program of its own: Triton reads the variable when a kernel is defined. ``--all`` runs more
shapes and types. Memory that a kernel must write is filled with NaN first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch

from supra_torch.ops import triton_linear_attention as triton_form
from supra_torch.ops.dense import linear_attention_dense
from supra_torch.ops.linear_attention import linear_attention_with_sums

# Relative to the largest value: sums of up to 300 x 64 products of random sign, each rounded at
# 2^-24, weights from exp2 of an exponent up to 300; float16 rounds operands' products at 2^-11.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3}


@dataclass(frozen=True)
class Case:
    B: int
    T: int
    K: int
    G: int
    Dk: int
    Dv: int
    normalise: bool = False
    masked: bool = False
    started: bool = False
    borders: tuple[int, ...] = ()
    segments: int = 1
    dtype: torch.dtype = torch.float32


CASES = (
    Case(1, 1, 1, 1, 1, 1),
    Case(2, 65, 1, 3, 20, 40, started=True),
    Case(1, 131, 2, 2, 20, 40, True, True, True, (0, 3, 3, 70, 131)),
    Case(1, 131, 1, 8, 16, 16, False, False, True, (0, 64, 131), 2),
    Case(1, 200, 1, 2, 64, 32, True, True, True, (), 3),
    Case(1, 97, 1, 1, 96, 64, True, False, False, (), 2),
)
MORE = (
    Case(2, 131, 3, 3, 32, 10, True, True, True),
    Case(1, 257, 3, 3, 64, 64, True),
    Case(1, 257, 3, 3, 128, 64, True, True, True),
    Case(1, 97, 1, 1, 256, 256, True, False, True),
    Case(2, 257, 1, 2, 64, 128, False, True, True, (), 4),
)


def main() -> None:
    every = "--all" in sys.argv
    passed = 0
    for seed, case in enumerate(CASES + MORE if every else CASES):
        for dtype in TOLERANCE:
            if every or dtype == torch.float32 or case.borders:
                check(replace(case, dtype=dtype), seed)
                passed += 1
    check_cuts((1, 31, 32, 33, 100) if every else (33,))
    for case in (Case(1, 40, 1, 2, 16, 8, True, True, True), Case(2, 20, 1, 1, 8, 8)):
        arguments = [x.requires_grad_() if exact(x) is not x else x for x in make_inputs(case, 0)]
        torch.library.opcheck(
            torch.ops.supra.linear_attention_triton.default, (*arguments, case.normalise)
        )
        check_backward_operator(arguments, case.normalise)
    print(f"passed {passed + 3}")


def check_backward_operator(inputs: Sequence[Any], normalise: bool) -> None:
    """What torch.compile relies on: schema and fake implementation."""
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
    output, sums, state = triton_form.linear_attention_triton(*given, normalise)
    for wanted in (False, True):
        torch.library.opcheck(
            triton_form.linear_attention_triton_backward,
            (output, None, state, *given, output, sums, state, wanted, wanted),
            test_utils=["test_schema", "test_faketensor"],
        )


def check(case: Case, seed: int) -> None:
    """Output, sums, state and every gradient against the dense form in float64."""
    inputs = make_inputs(case, seed)
    expected = run(linear_attention_dense, case, [exact(x) for x in inputs])
    with patch.object(triton_form, "segments_for", forced(case.segments)), nan_memory():
        found = run(triton_form.linear_attention_triton, case, inputs)
    compare(case, inputs, expected, found, TOLERANCE[case.dtype])


def compare(
    case: Case,
    inputs: Sequence[Any],
    expected: dict[str, torch.Tensor],
    found: dict[str, torch.Tensor],
    tolerance: float,
) -> None:
    """Every result within ``tolerance`` of the largest value that it is made of."""
    for name in expected:
        if not expected[name].numel():
            continue
        scale = expected[name].abs().max().item()
        if name == "dslope":
            # It is the difference of such sums over queries and over keys.
            terms = exact(inputs[0]) * expected["dq"]
            scale = max(scale, terms.abs().sum((0, 1, 3)).max().item())
        error = (found[name].double() - expected[name]).abs()
        worst = error.max().item() / scale
        # Also false for NaN.
        assert worst <= tolerance, f"{case}: {name} is off by {worst:.1e}"


def check_cuts(cuts: Sequence[int]) -> None:
    """A sequence in pieces is the whole."""
    q, k, v, slope, _, _, _ = make_inputs(Case(1, 101, 2, 2, 20, 12, True), 0)
    decay = torch.exp(-slope)

    def scan(start: int, end: int, state: Any) -> Any:
        rows = slice(start, end)
        return linear_attention_with_sums(
            q[:, rows], k[:, rows], v[:, rows], decay, initial_state=state,
            implementation="triton",
        )  # fmt: skip

    whole, _, final = scan(0, 101, None)
    for cut in cuts:
        first, _, state = scan(0, cut, None)
        second, _, last = scan(cut, 101, state)
        pieces = torch.cat([first, second], dim=1)
        assert (pieces - whole).abs().max() <= 1e-5 * whole.abs().max(), cut
        assert (last - final).abs().max() <= 1e-5 * final.abs().max(), cut


def make_inputs(case: Case, seed: int) -> list[Any]:
    """q, k, v, slope, initial_state, mask, cu_seqlens; gamma from 0.43 to 1."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    H = case.K * case.G
    slope = -torch.log(0.43 + 0.57 * torch.rand(H, generator=generator))
    slope[0] = 0.0
    borders = torch.tensor(case.borders) if case.borders else None
    sequences = len(case.borders) - 1 if case.borders else case.B
    state = noise(sequences, H, case.Dk, case.Dv + case.normalise).abs() if case.started else None
    mask = torch.rand(case.B, case.T, generator=generator) > 0.3 if case.masked else None
    # Positive features, as every feature map of a normalised model has them.
    q, k = noise(case.B, case.T, H, case.Dk).abs(), noise(case.B, case.T, case.K, case.Dk).abs()
    v = noise(case.B, case.T, case.K, case.Dv)
    scale = case.Dk**-0.5
    return [(q * scale).to(case.dtype), k.to(case.dtype), v.to(case.dtype), slope, state, mask,
            borders]  # fmt: skip


def exact(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def run(operator: Any, case: Case, inputs: list[Any]) -> dict[str, torch.Tensor]:
    """Results, and the gradients of a random combination of all three."""
    leaves = [x.detach().requires_grad_() if x is not None else None for x in inputs[:5]]
    results = operator(*leaves, inputs[5], inputs[6], case.normalise)
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for result, weight in zip(results, (1.0, 0.01, 0.1), strict=True):
        loss = loss + (result.double().cpu() * weight * noise_like(result, generator)).sum()
    loss.backward()
    named = dict(zip(("output", "sums", "state"), results, strict=True))
    for name, leaf in zip(("dq", "dk", "dv", "dslope", "dstate"), leaves, strict=True):
        if leaf is not None:
            named[name] = leaf.grad
    return {name: tensor.detach().cpu() for name, tensor in named.items()}


def noise_like(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(x.shape, generator=generator, dtype=torch.float64)


def forced(segments: int) -> Any:
    """``segments_for`` with a number of its own; the last segment may be shorter, or empty."""

    def cut(programs: int, tokens: int, block_t: int, processors: int) -> tuple[int, int]:
        chunks = -(-tokens // block_t)
        return segments, -(-chunks // segments) * block_t

    return cut


def nan_memory() -> Any:
    """torch.empty that shows what a kernel forgot to write."""
    empty = torch.empty

    def filled(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*arguments, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return patch.object(torch, "empty", filled)


if __name__ == "__main__":
    main()
