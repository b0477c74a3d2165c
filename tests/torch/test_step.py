"""The decode step: torch against the definition, the Triton kernel interpreted and compiled."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from supra_core.mixers import linear as reference  # noqa: E402
from supra_torch.ops.step import (  # noqa: E402
    StepInputs,
    linear_attention_step,
    linear_attention_step_,
    linear_attention_step_with_sums,
)

ROOT = Path(__file__).resolve().parents[2]
# Sums of at most 100 products, each rounded at 2^-24 with errors of random sign, over ten steps.
TOLERANCE = 2e-6

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def _inputs(seed: int, B: int, T: int, K: int, G: int, Dk: int, Dv: int, extra: int) -> Any:
    rng = np.random.default_rng(seed)
    decay = rng.uniform(0.4, 1.0, K * G)
    decay[0] = 1.0
    return (
        np.abs(rng.normal(size=(B, T, K * G, Dk))),
        np.abs(rng.normal(size=(B, T, K, Dk))),
        rng.normal(size=(B, T, K, Dv)),
        decay,
        np.abs(rng.normal(size=(B, K * G, Dk, Dv + extra))),
    )


def _close(found: Any, expected: Any) -> None:
    assert np.abs(found.numpy() - expected).max() <= TOLERANCE * np.abs(expected).max()


@given(
    seed=st.integers(0, 2**16),
    B=st.integers(1, 3),
    T=st.integers(1, 10),
    K=st.integers(1, 3),
    G=st.sampled_from([1, 3, 8]),
    Dk=st.sampled_from([1, 10, 20, 100]),
    Dv=st.sampled_from([1, 7, 33]),
    normaliser=st.sampled_from([None, "sum"]),
    sinks=st.booleans(),
    masked=st.booleans(),
    in_place=st.booleans(),
)
def test_steps_are_the_reference(
    seed: int, B: int, T: int, K: int, G: int, Dk: int, Dv: int,
    normaliser: Literal["sum"] | None, sinks: bool, masked: bool, in_place: bool,
) -> None:  # fmt: skip
    normalise = normaliser == "sum"
    q, k, v, decay, state = _inputs(seed, B, T, K, G, Dk, Dv, int(normalise))
    mask = np.random.default_rng(seed).random((B, T)) > 0.3 if masked else None
    sink = np.exp(np.random.default_rng(seed).normal(size=K * G)) if sinks and normalise else None
    expected, final = reference.exact_linear_attention(
        q, k, v, decay, initial_state=state, mask=mask, normaliser=normaliser, sink=sink
    )
    now = torch.from_numpy(state).float()
    slope = -torch.log(torch.from_numpy(decay)).float()
    step = linear_attention_step_ if in_place else linear_attention_step
    outputs = []
    for t in range(T):
        row = None if mask is None else torch.from_numpy(mask[:, t])
        given_state = now
        heads = (torch.from_numpy(x[:, t]).float() for x in (q, k, v))
        output, now = step(
            StepInputs(*heads, slope, now, normalise, row),
            sink=None if sink is None else torch.from_numpy(sink).float(),
        )
        assert (now is given_state) == in_place
        outputs.append(output)
    found, valid = torch.stack(outputs, dim=1), slice(None) if mask is None else mask
    if mask is None or mask.any():
        _close(found[valid], expected[valid])
    _close(now, final)


def test_slow_decay_is_not_rounded_away() -> None:
    # gamma itself, rounded to float32, would be off by up to 3e-8 a step, always to one side:
    # this slope lies half way between two values of gamma. Sums round to either side.
    slope, steps = torch.tensor([1.5 * 2.0**-24 + 2.0**-14]), 4000
    q = k = torch.ones(1, 1, 1)
    state, exact = torch.full((1, 1, 1, 1), 1000.0), torch.full((1, 1, 1, 1), 1000.0).double()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        v = torch.rand(1, 1, 1, generator=generator)
        _, state = linear_attention_step(StepInputs(q, k, v, slope, state, False))
        exact = exact * torch.exp(-slope.double()) + v.double()
    # A random walk of 4000 roundings at 2^-24, three times over.
    assert ((state - exact).abs() / exact).item() <= 3 * steps**0.5 * 2.0**-24


def test_gradients_pass() -> None:
    inputs = [
        torch.rand(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 4, 3), (2, 2, 3), (2, 2, 5), (4,), (2, 4, 3, 6))
    ]
    assert torch.autograd.gradcheck(
        lambda *given: linear_attention_step_with_sums(StepInputs(*given, True)), inputs
    )


def test_bad_input_is_named() -> None:
    q, k, v = torch.ones(1, 4, 3), torch.ones(1, 2, 3), torch.ones(1, 2, 5)
    slope, state = torch.zeros(4), torch.zeros(1, 4, 3, 5)
    with pytest.raises(ValueError, match="do not fit together"):
        linear_attention_step(StepInputs(q, k[..., :2], v, slope, state, False))
    with pytest.raises(ValueError, match="state must have shape"):
        linear_attention_step(StepInputs(q, k, v, slope, state, True))
    with pytest.raises(ValueError, match="slope must have shape"):
        linear_attention_step(StepInputs(q, k, v, slope[:2], state, False))
    with pytest.raises(ValueError, match="mask must be"):
        linear_attention_step(StepInputs(q, k, v, slope, state, False, mask=torch.ones(1)))
    with pytest.raises(ValueError, match="cannot run"):
        linear_attention_step(StepInputs(q, k, v, slope, state, False), implementation="triton")
    with pytest.raises(ValueError, match="unknown implementation"):
        linear_attention_step(StepInputs(q, k, v, slope, state, False), implementation="quick")  # type: ignore[arg-type]


@needs_triton
@pytest.mark.parametrize(
    ("arguments", "count"), [([], 8), pytest.param(["--all"], 32, marks=pytest.mark.slow)]
)
def test_the_kernel_in_the_interpreter(arguments: list[str], count: int) -> None:
    paths = os.pathsep.join(str(ROOT / part) for part in (".", "backends"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.torch.triton_step_cases", *arguments], cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"passed {count}"


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("Dk", "Dv"), [(64, 64), (128, 64), (128, 128), (256, 256), (96, 80)])
def test_the_kernel_compiles_without_spills(
    architecture: int, normalise: bool, Dk: int, Dv: int, tmp_path: Path
) -> None:
    ptx, compiled = _compiled(architecture, normalise, Dk, Dv)
    assert compiled.metadata.shared <= 48 * 1024
    assert _spills(ptx, architecture, tmp_path) == 0


def _compiled(architecture: int, normalise: bool, Dk: int, Dv: int) -> tuple[str, Any]:
    """PTX and metadata for bfloat16 inputs, with no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from supra_torch.ops.triton_step import _NUM_WARPS, blocks, step_kernel

    pointers = dict.fromkeys(("q", "k", "v", "output"), "*bf16")
    pointers |= dict.fromkeys(("slope", "state", "new_state"), "*fp32")
    names = step_kernel.arg_names
    constants = {"mask": None, "DK": Dk, "DV": Dv, **blocks(Dk, Dv, normalise)}
    if normalise:
        pointers["sums"] = "*fp32"
    else:
        constants["sums"] = None
    signature = {
        name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names
    }
    source = ASTSource(
        fn=step_kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    target = GPUTarget("cuda", architecture, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": _NUM_WARPS})
    return compiled.asm["ptx"], compiled


def _spills(ptx: str, architecture: int, folder: Path) -> int:
    """Bytes of registers stored to memory, by ptxas."""
    import re

    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    (folder / "step.ptx").write_text(ptx)
    suffix = "a" if architecture >= 90 else ""
    done = subprocess.run(
        [ptxas, "-v", f"--gpu-name=sm_{architecture}{suffix}", "step.ptx", "-o", "step.cubin"],
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = re.findall(r"(\d+) bytes spill stores", done.stderr)
    assert found, done.stderr
    return sum(map(int, found))
