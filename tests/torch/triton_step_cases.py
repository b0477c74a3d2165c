"""The Triton decode step in the interpreter; run with TRITON_INTERPRET=1, prints ``passed N``.

A program of its own: Triton reads the variable when a kernel is defined. ``--all`` runs every
combination with every shape, else each runs once and each shape twice.
"""

from __future__ import annotations

import itertools
import math
import sys

import torch

from supra_torch.ops import kernels, step

# Relative to the largest value. An output sums Dk products, the errors of random sign:
# sqrt(256) 2^-24 = 1e-6; a state's element is rounded three times; float16 rounds outputs at 2^-11.
TOLERANCE = 1e-6
SHAPES = ((2, 3, 3, 64, 64), (1, 2, 1, 20, 7), (3, 1, 8, 96, 150), (1, 1, 2, 1, 1))
TYPES = (torch.float32, torch.float16)


def main() -> None:
    passed = 0
    for seed, (shape, normalise, masked, dtype) in enumerate(
        itertools.product(SHAPES, (False, True), (False, True), TYPES)
    ):
        number = SHAPES.index(shape)
        if "--all" not in sys.argv and seed % 8 not in (number, 7 - number):
            continue
        torch.manual_seed(seed)
        q, k, v, slope, state, mask = inputs(*shape, normalise, masked, dtype)
        exact = step.linear_attention_step_with_sums(
            step.StepInputs(*(x.double() for x in (q, k, v, slope, state)), normalise, mask)
        )
        found = step.linear_attention_step_with_sums(
            step.StepInputs(q, k, v, slope, state, normalise, mask), implementation="triton"
        )
        assert found[0].dtype == dtype
        for name, ours, theirs in zip(("output", "sums", "state"), found, exact, strict=True):
            rounded = 2.0**-11 if dtype == torch.float16 and name == "output" else 0.0
            check(ours, theirs, TOLERANCE + rounded, f"{name} of {shape} {normalise} {dtype}")
        overwritten = state.clone()
        output, same = step.linear_attention_step_(
            step.StepInputs(q, k, v, slope, overwritten, normalise, mask), implementation="triton"
        )
        assert same is overwritten
        assert torch.equal(output, found[0])
        assert torch.equal(overwritten, found[2])
        passed += 1
    check_strides()
    check_nothing_written()
    check_operators()
    print(f"passed {passed}")


def inputs(
    B: int, K: int, G: int, Dk: int, Dv: int, normalise: bool, masked: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    H = K * G
    slope = torch.linspace(0, 1, H) ** 3  # gamma from 1 to 0.37
    mask = torch.arange(B) % 2 == 1 if masked else None
    return (
        torch.rand(B, H, Dk).to(dtype), torch.rand(B, K, Dk).to(dtype),
        torch.randn(B, K, Dv).to(dtype), slope, torch.rand(B, H, Dk, Dv + normalise), mask,
    )  # fmt: skip


def check(found: torch.Tensor, exact: torch.Tensor, tolerance: float, what: str) -> None:
    if exact.numel() == 0:
        assert found.numel() == 0, what
        return
    error = ((found.double() - exact).abs().max() / exact.abs().max()).item()
    assert math.isfinite(error) and error <= tolerance, f"{what}: {error:.1e} > {tolerance:.1e}"


def _by_kernel(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return step.linear_attention_step(step.StepInputs(*tensors, True), implementation="triton")


def check_strides() -> None:
    """Views of one projection, channels apart or together, give what copies give."""
    q, k, v, slope, state, _ = inputs(2, 2, 2, 12, 12, True, False, torch.float32)
    joint = torch.cat([q, k, v], dim=1)
    views = (joint[:, :4], joint[:, 4:6], joint[:, 6:])
    apart = tuple(x.mT.contiguous().mT for x in (q, k, v))
    expected, _ = _by_kernel(q, k, v, slope, state)
    for given in (views, apart):
        found, _ = _by_kernel(*given, slope, state)
        assert torch.equal(found, expected)


def check_nothing_written() -> None:
    """q . z = 0 gives an output of 0, not NaN."""
    q, k, v, slope, state, _ = inputs(1, 1, 1, 8, 8, True, False, torch.float32)
    output, _ = _by_kernel(q, torch.zeros_like(k), v, slope, torch.zeros_like(state))
    assert torch.equal(output, torch.zeros_like(output))


def check_operators() -> None:
    """What torch.compile relies on: schema, fake implementation, mutation."""
    for normalise in (False, True):
        q, k, v, slope, state, mask = inputs(2, 2, 2, 12, 10, normalise, normalise, torch.float16)
        for operator in (kernels.step_kernel, kernels.step_kernel_):
            torch.library.opcheck(operator, (q, k, v, slope, state, normalise, mask))
    q, k, v, slope, state, _ = inputs(2, 2, 2, 12, 10, True, False, torch.float32)
    compiled = torch.compile(_by_kernel, fullgraph=True, backend="eager")
    given = (q, k, v, slope, state)
    for ours, theirs in zip(compiled(*given), _by_kernel(*given), strict=True):
        assert torch.equal(ours, theirs)


if __name__ == "__main__":
    main()
