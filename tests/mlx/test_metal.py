"""The Metal kernel's own source, compiled as C++: one thread for each of the GPU's."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from supra_core.mixers import linear as reference  # noqa: E402
from supra_mlx import metal, ops, selftest  # noqa: E402

COMPILER = shutil.which("c++") or shutil.which("g++")

# What the kernel's source uses of Metal. A threadgroup's memory is shared by its threads as a
# static array is, since one threadgroup runs at a time.
EMULATION = """
#include <barrier>
#include <thread>
#include <vector>
typedef unsigned int uint;
struct uint3 {{ uint x, y, z; }};
namespace mem_flags {{ enum {{ mem_threadgroup }}; }}
#define threadgroup static
constexpr uint {sizes};
constexpr bool MASKED = {masked};
static void body(std::barrier<>* all, uint3 thread_position_in_grid,
    uint3 thread_position_in_threadgroup, const int* q_shape, const float* q, const float* k,
    const float* v, const float* decay, const float* state, const bool* mask, float* out,
    float* state_out) {{
    auto threadgroup_barrier = [all](int) {{ all->arrive_and_wait(); }};
{source}
}}
extern "C" void run(uint blocks, uint heads, const int* q_shape, const float* q, const float* k,
    const float* v, const float* decay, const float* state, const bool* mask, float* out,
    float* state_out) {{
    for (uint z = 0; z < heads; ++z) for (uint block = 0; block < blocks; ++block) {{
        std::barrier<> all(COLUMNS * ROWS);
        std::vector<std::thread> threads;
        for (uint y = 0; y < ROWS; ++y) for (uint x = 0; x < COLUMNS; ++x) {{
            threads.emplace_back(body, &all, uint3{{block * COLUMNS + x, y, z}}, uint3{{x, y, 0}},
                q_shape, q, k, v, decay, state, mask, out, state_out);
        }}
        for (auto& thread : threads) thread.join();
    }}
}}
"""


def emulated(folder: Path, *inputs: Any, mask: Any = None) -> tuple[Any, Any]:
    """What the kernel computes, launched as :func:`metal.metal_recurrence` launches it."""
    q, k, v, decay, state = (np.ascontiguousarray(x, dtype=np.float32) for x in inputs)
    B, T, H, Dk = q.shape
    K, Dv = v.shape[2:]
    sizes = {
        "H": H, "K": K, "Dk": Dk, "Dv": Dv, "ROWS": metal.METAL_ROWS,
        "COLUMNS": metal.METAL_COLUMNS,
    }  # fmt: skip
    text = EMULATION.format(
        sizes=", ".join(f"{name} = {size}" for name, size in sizes.items()),
        masked=str(mask is not None).lower(), source=metal.METAL_SOURCE,
    )  # fmt: skip
    (folder / "kernel.cpp").write_text(text)
    library = folder / "kernel.so"
    subprocess.run(
        [str(COMPILER), "-std=c++20", "-O1", "-pthread", "-shared", "-fPIC",
         str(folder / "kernel.cpp"), "-o", str(library)],
        check=True,
    )  # fmt: skip
    shape = np.array(q.shape, dtype=np.int32)
    valid = np.ones(1, dtype=bool) if mask is None else np.ascontiguousarray(mask)
    # What nothing writes stays NaN.
    out = np.full((B, T, H, Dv), np.nan, dtype=np.float32)
    after = np.full_like(state, np.nan)
    run = ctypes.CDLL(str(library)).run
    arrays = (shape, q, k, v, decay, state, valid, out, after)
    run(-(-Dv // metal.METAL_COLUMNS), B * H, *(a.ctypes.data_as(ctypes.c_void_p) for a in arrays))
    return out, after


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("shape", "masked"),
    [
        ((1, 1, 9, 3, 128, 65), False),
        ((2, 5, 6, 2, 5, 3), True),
        ((1, 3, 2, 2, 17, 33), False),
        ((3, 2, 4, 1, 8, 32), True),
    ],
)
def test_the_kernel_is_the_reference(shape: tuple[int, ...], masked: bool, tmp_path: Path) -> None:
    B, T, H, K, Dk, Dv = shape
    rng = np.random.default_rng(0)
    q, k, v = (
        rng.normal(size=(B, T, heads, channels)).astype(np.float32)
        for heads, channels in ((H, Dk), (K, Dk), (K, Dv))
    )
    decay = rng.uniform(0.5, 1, H).astype(np.float32)
    before = rng.normal(size=(B, H, Dk, Dv)).astype(np.float32)
    mask = rng.random((B, T)) < 0.6 if masked else None
    out, after = emulated(tmp_path, q, k, v, decay, before, mask=mask)
    expected, last = reference.exact_linear_attention(
        q, k, v, decay, initial_state=before, mask=mask, form="recurrent"
    )
    valid = np.ones((B, T), dtype=bool) if mask is None else mask
    # T rank-one updates and a sum over Dk, each rounded.
    atol = 2.0**-24 * (T + Dk) * 4 * np.abs(expected).max()
    np.testing.assert_allclose(out[valid], expected[valid], rtol=0, atol=atol)
    np.testing.assert_allclose(after, last, rtol=0, atol=2.0**-24 * (T + 2) * 8)
    assert np.isfinite(out).all()


def test_it_is_off_without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(metal.METAL_VARIABLE, "1")
    if metal.metal_available():
        pytest.skip("there is Metal here: supra doctor --deep runs the kernel")
    assert not metal.metal_enabled()


def test_the_self_test_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_ops(*inputs: Any) -> Any:
        return selftest._by_ops(*inputs)

    def wrong(*inputs: Any) -> Any:
        out, state = selftest._by_ops(*inputs)
        return out * 1.001, state

    monkeypatch.setattr(selftest, "_REPEATS", 2)
    for recurrence, passed in ((by_ops, True), (wrong, False)):
        monkeypatch.setattr(selftest, "metal_recurrence", recurrence)
        records = selftest.as_records(selftest.compare_metal())
        assert [row["passed"] for row in records] == [passed] * len(selftest.SHAPES)


def test_a_step_uses_it_when_it_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments are those of the operations that it replaces."""
    seen = []

    def recurrence(q: Any, k: Any, v: Any, decay: Any, state: Any, mask: Any) -> Any:
        seen.append(q.shape)
        out, after = reference.exact_linear_attention(
            *(np.array(x) for x in (q, k, v, decay)), initial_state=np.array(state),
            mask=None if mask is None else np.array(mask), form="recurrent",
        )  # fmt: skip
        return mx.array(out.astype(np.float32)), mx.array(after.astype(np.float32))

    rng = np.random.default_rng(1)
    q, k, v = (mx.array(rng.random((2, 1, h, 4)).astype(np.float32)) for h in (6, 2, 2))
    decay = mx.array(rng.uniform(0.5, 1, 6).astype(np.float32))
    for mask in (None, mx.array([[True], [False]])):
        given = {"mask": mask, "normaliser": "sum", "sink": mx.ones((6,))}
        monkeypatch.undo()
        expected = ops.linear_attention(q, k, v, decay, **given)
        monkeypatch.setattr(ops, "metal_enabled", lambda: True)
        monkeypatch.setattr(ops, "metal_recurrence", recurrence)
        found = ops.linear_attention(q, k, v, decay, **given)
        np.testing.assert_allclose(found[0][0], expected[0][0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(found[1], expected[1], rtol=0, atol=1e-5)
    assert seen == [(2, 1, 6, 4)] * 2
