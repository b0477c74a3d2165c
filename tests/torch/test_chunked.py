"""The chunked form and its gradients, as a custom operator: packed, masked, with a state."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from supra_torch.ops import linear_attention  # noqa: E402
from supra_torch.ops.chunked import linear_attention_chunked  # noqa: E402
from supra_torch.ops.dense import linear_attention_dense  # noqa: E402

# float64 sums of at most 1,000 products, relative to the largest value: 1,000 x 2^-53 = 1e-13.
TOLERANCE = 1e-12


@dataclass(frozen=True)
class Inputs:
    q: Any
    k: Any
    v: Any
    slope: Any
    initial_state: Any
    mask: Any
    cu_seqlens: Any
    normalise: bool

    @property
    def arguments(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())

    @property
    def differentiable(self) -> list[Any]:
        tensors = [self.q, self.k, self.v, self.slope, self.initial_state]
        return [x for x in tensors if x is not None]


def random_inputs(
    seed: int = 0, B: int = 1, T: int = 20, K: int = 2, G: int = 3, Dk: int = 5, Dv: int = 7,
    normalise: bool = False, masked: bool = False, started: bool = False,
    cu_seqlens: list[int] | None = None, dtype: Any = torch.float64,
) -> Inputs:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def noise(*shape: int) -> Any:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    sequences = B if cu_seqlens is None else len(cu_seqlens) - 1
    slope = noise(K * G).abs() * 0.3
    slope[0] = 0.0
    state = noise(sequences, K * G, Dk, Dv + normalise).abs()
    return Inputs(
        noise(B, T, K * G, Dk).abs().to(dtype).requires_grad_(),
        noise(B, T, K, Dk).abs().to(dtype).requires_grad_(),
        noise(B, T, K, Dv).to(dtype).requires_grad_(),
        slope.to(wide).requires_grad_(),
        state.to(wide).requires_grad_() if started else None,
        noise(B, T) > -0.5 if masked else None,
        None if cu_seqlens is None else torch.tensor(cu_seqlens),
        normalise,
    )


def results(operator: Any, inputs: Inputs, seed: int = 1) -> list[Any]:
    """Output, sums, state, and the gradients for random gradients of all three."""
    found = operator(*inputs.arguments)
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in found]
    used = [(x, w) for x, w in zip(found, weights, strict=True) if x.numel()]
    outputs, output_gradients = zip(*used, strict=True)
    gradients = torch.autograd.grad(outputs, inputs.differentiable, output_gradients)
    return [x.detach() for x in found] + list(gradients)


def assert_close(found: list[Any], expected: list[Any], tolerance: float = TOLERANCE) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        if theirs.numel():
            assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max())


@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.sampled_from([0, 1, 5, 63, 64, 65, 150]), min_size=1, max_size=4),
    packed=st.booleans(),
    K=st.integers(1, 2),
    G=st.sampled_from([1, 2, 3]),
    Dk=st.sampled_from([1, 6]),
    Dv=st.sampled_from([1, 7]),
    normalise=st.booleans(),
    masked=st.booleans(),
    started=st.booleans(),
)
@example(0, [0, 65, 0, 64, 1], True, 2, 3, 6, 7, True, True, True)
@example(0, [64, 64], True, 2, 3, 6, 7, False, False, False)
@example(0, [1100], False, 2, 3, 6, 7, True, False, True)
@example(0, [1100], True, 1, 20, 1, 7, True, True, True)
def test_results_and_gradients_are_the_dense_forms(
    seed: int, lengths: list[int], packed: bool, K: int, G: int, Dk: int, Dv: int,
    normalise: bool, masked: bool, started: bool,
) -> None:  # fmt: skip
    borders = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    if borders[-1] == 0:
        return
    inputs = random_inputs(
        seed, 1 if packed else 2, borders[-1], K, G, Dk, Dv, normalise, masked, started,
        borders if packed else None,
    )  # fmt: skip
    found = results(linear_attention_chunked, inputs)
    assert_close(found, results(linear_attention_dense, inputs))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_packed_is_each_sequence_by_itself(masked: bool, normalise: bool) -> None:
    lengths = [70, 0, 1, 64, 130]
    borders = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    inputs = random_inputs(
        T=borders[-1], normalise=normalise, masked=masked, started=True, cu_seqlens=borders
    )
    output, sums, state = linear_attention_chunked(*inputs.arguments)
    (output.square().sum() + sums.sum() + state.square().sum()).backward()
    together = [x.grad for x in inputs.differentiable]
    for x in inputs.differentiable:
        x.grad = None
    for n, (start, end) in enumerate(zip(borders, borders[1:], strict=False)):
        before = inputs.initial_state[n : n + 1]
        if start == end:
            assert torch.equal(state[n : n + 1], before)
            before.square().sum().backward()
            continue
        rows = slice(start, end)
        alone = linear_attention_chunked(
            *(x[:, rows] for x in (inputs.q, inputs.k, inputs.v)), inputs.slope, before,
            None if inputs.mask is None else inputs.mask[:, rows], None, normalise,
        )  # fmt: skip
        (alone[0].square().sum() + alone[1].sum() + alone[2].square().sum()).backward()
        assert_close(
            [output[:, rows], state[n : n + 1], sums[:, rows] if normalise else sums],
            [alone[0], alone[2], alone[1]],
        )
    assert_close(together, [x.grad for x in inputs.differentiable])


CASES = {
    "plain": random_inputs(),
    "mask": random_inputs(B=2, masked=True),
    "state": random_inputs(B=2, T=70, started=True),
    "packed": random_inputs(T=90, cu_seqlens=[0, 3, 3, 80, 90]),
    "packed state and mask": random_inputs(
        T=90, cu_seqlens=[0, 3, 3, 80, 90], started=True, masked=True, normalise=True
    ),
    "normalise": random_inputs(normalise=True, started=True),
    "one head, float32": random_inputs(K=1, G=1, T=70, dtype=torch.float32),
    "bfloat16": random_inputs(dtype=torch.bfloat16, normalise=True),
}


@pytest.mark.parametrize("name", CASES)
def test_opcheck(name: str) -> None:
    inputs = CASES[name]
    operator = torch.ops.supra.linear_attention_chunked.default
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if inputs.q.dtype == torch.float64:
        # Runs through the compiler's tracer and compares the numbers.
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, inputs.arguments, test_utils=tests)
    given = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs.arguments]
    output, sums, state, borders = operator(*given)
    torch.library.opcheck(
        torch.ops.supra.linear_attention_chunked_backward.default,
        (output, sums, state, *given[:7], output, sums, borders, True),
        test_utils=["test_schema", "test_faketensor"],
    )


@pytest.mark.parametrize("name", ["state", "packed state and mask", "normalise"])
def test_gradcheck(name: str) -> None:
    if name.startswith("packed"):
        inputs = random_inputs(
            T=6, K=1, G=2, Dk=2, Dv=2, cu_seqlens=[0, 4, 4, 6], started=True, masked=True,
            normalise=True,
        )  # fmt: skip
    else:
        inputs = random_inputs(
            T=67, K=1, G=2, Dk=1, Dv=1, started=True, normalise=name == "normalise"
        )
    fixed = (inputs.mask, inputs.cu_seqlens, inputs.normalise)

    def outputs(*tensors: Any) -> Any:
        found = linear_attention_chunked(*tensors, *fixed)
        return tuple(x for x in found if x.numel())

    assert torch.autograd.gradcheck(outputs, inputs.arguments[:5], fast_mode=True)


def test_compiles_without_a_graph_break() -> None:
    inputs = random_inputs(B=2, T=70, normalise=True, masked=True, dtype=torch.float32)
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    decay = torch.exp(-inputs.slope.detach())

    def loss(q: Any, k: Any, v: Any) -> Any:
        output, state = linear_attention(
            q, k, v, decay, mask=inputs.mask, normaliser="sum", implementation="chunked"
        )
        return output.square().sum() + state.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    assert_close(list(torch.autograd.grad(compiled(q, k, v), (q, k, v))), list(expected), 1e-5)


def test_nothing_written_is_zero_and_so_are_its_gradients() -> None:
    inputs = random_inputs(T=70, normalise=True)
    inputs = replace(inputs, mask=torch.zeros(1, 70, dtype=torch.bool))
    found = results(linear_attention_chunked, inputs)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found[:3])
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalise", [False, True])
def test_short_types_are_near_float64(dtype: Any, normalise: bool) -> None:
    inputs = random_inputs(B=2, T=300, Dk=20, Dv=20, normalise=normalise, started=True, dtype=dtype)
    exact = Inputs(*(x.detach().double().requires_grad_() if torch.is_tensor(x) else x
                     for x in inputs.arguments))  # fmt: skip
    found, expected = (
        [x.double() for x in results(linear_attention_chunked, i)] for i in (inputs, exact)
    )
    # Half an ulp, relative to the largest value, for the inputs of each of the products in a row
    # (weights, numerator and sum, output, its gradient, theirs); random signs between sums.
    unit = torch.finfo(dtype).eps / 2
    assert_close(found, expected, 8 * unit)


def test_cu_seqlens_that_are_not_the_tokens() -> None:
    inputs = random_inputs(T=10, cu_seqlens=[0, 4, 9])
    with pytest.raises(ValueError, match="must rise from 0 to 10"):
        linear_attention_chunked(*inputs.arguments)


MEMORY = """
import resource, sys, torch
from supra_torch.ops import linear_attention
T = int(sys.argv[1])
torch.set_num_threads(1)
q, k, v = (torch.randn(1, T, heads, 64, requires_grad=True) for heads in (9, 3, 3))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
output, _ = linear_attention(q, k, v, torch.full((9,), 0.99), implementation="chunked")
output.backward(torch.ones_like(output))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_is_linear_in_the_length() -> None:
    used = []
    for tokens in (8192, 16384, 32768):
        command = [sys.executable, "-c", MEMORY, str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        used.append(int(done.stdout) * 1024)
    # Inputs, output, and the gradients of all of them: 2 x (9 + 3 + 3 + 9) heads of 64 float32.
    token = 48 * 64 * 4
    assert used[2] - used[1] <= 1.25 * 16384 * token
    assert used[1] - used[0] <= 1.25 * 8192 * token
