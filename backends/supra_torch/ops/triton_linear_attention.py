"""Causal linear attention on a GPU: launching the Triton kernel, and its gradients.

The kernel, and the identities by which one kernel is forward and backward, are in
``triton_kernels.py``; how it is cut for a GPU is in ``triton_table.py``. Checked against
float64 in Triton's interpreter and on an H200, and compiled ahead of time for others.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from supra_torch.ops.target import kind
from supra_torch.ops.triton_kernels import scan_kernel, segment_kernel, widen_kernel
from supra_torch.ops.triton_table import block_of, segments_for, tiles_for

Role = Literal["output", "dq", "dk", "dv"]

LARGEST_HEAD = 256
"""Channels a head (Dk or Dv) that the kernel takes."""

INTERPRETED = triton.knobs.runtime.interpret
"""Whether the kernels run in Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1)."""


# --- launching --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """What the four runs share: log2 gamma (H,), valid tokens before each (B, T + 1), borders."""

    log2_decay: Tensor
    counted: Tensor | None
    borders: Tensor | None
    sequences: int
    tokens: int
    heads: int
    normalise: bool

    @staticmethod
    def of(
        q: Tensor, slope: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, normalise: bool
    ) -> _Problem:
        B, T, H, _ = q.shape
        return _Problem(
            log2_decay=slope.float() * -_LOG2_E,
            counted=None if mask is None else F.pad(mask.cumsum(1, dtype=torch.int32), (1, 0)),
            borders=None if cu_seqlens is None else cu_seqlens.contiguous(),
            sequences=B if cu_seqlens is None else len(cu_seqlens) - 1,
            tokens=T,
            heads=H,
            normalise=normalise,
        )


_LOG2_E = math.log2(math.e)


def _scan(
    problem: _Problem,
    role: Role,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    sums: Tensor | None = None,
    initial: _State | None = None,
    final: _State | None = None,
    partner: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The kernel in one role: output (B, T, H, V) in q's type, and its products with ``partner``.

    q and k (B, T, heads, K), v (B, T, heads, V) in their roles, heads dividing H; scale and
    shift as :func:`_widen` returns them; sums (B, T, H) and final: written; partner
    (B, T, heads, V). The products with it are (B, T, H), float32.
    """
    B, T, _, K = q.shape
    V, H = v.shape[3], problem.heads
    q, k, v = (_channels_last(x) for x in (q, k, v))
    capability, processors = _hardware(q.device)
    masked = problem.counted is not None or problem.borders is not None
    tiles = tiles_for(capability, q.element_size(), K, V, masked)
    blocks = -(-V // tiles.block_v)
    programs = problem.sequences * H * blocks
    segments, segment_length = segments_for(programs, T, tiles.block_t, processors)
    # Tokens outside every packed sequence are nobody's output.
    new = torch.empty if problem.borders is None else torch.zeros
    output = new(B, T, H, V, dtype=q.dtype, device=q.device)
    constants: dict[str, Any] = {
        "ROLE": role, "NORMALISE": problem.normalise, "K": K, "V": V,
        "BLOCK_T": tiles.block_t, "BLOCK_K": block_of(K), "BLOCK_V": tiles.block_v,
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
    grid = (programs * segments,)
    states = vectors = counts = None
    if segments > 1:
        parts = (problem.sequences, H, segments)
        states = torch.empty(*parts, K, V, dtype=torch.float32, device=q.device)
        vectors = torch.empty(*parts, K if role == "output" else V, device=q.device)
        counts = torch.empty(problem.sequences, segments, device=q.device)
        segment_kernel[grid](
            k, v, problem.log2_decay, problem.counted, problem.borders, scale, shift,
            states, vectors, counts,
            T, H, segments, segment_length, H // k.shape[2], H // v.shape[2],
            *k.stride()[:3], *v.stride()[:3], **constants,
        )  # fmt: skip
    dots = None
    if partner is not None:
        partner = _channels_last(partner)
        dots = torch.zeros(blocks, B, T, H, device=q.device)
    strides = (1, K) if role in ("dq", "dk") else (V, 1)
    scan_kernel[grid](
        q, k, v, output, problem.log2_decay, problem.counted, problem.borders, scale, shift, sums,
        *_pointers(initial), *_pointers(final), states, vectors, counts, partner, dots,
        T, H, segments, segment_length, H // q.shape[2], H // k.shape[2], H // v.shape[2],
        1 if partner is None else H // partner.shape[2],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *((0, 0, 0) if partner is None else partner.stride()[:3]),
        *strides, *strides, B * T * H, **constants,
    )  # fmt: skip
    return output, None if dots is None else dots.sum(0)


@dataclass(frozen=True)
class _State:
    """A state taken apart: matrix (N, H, Dk, Dv), and with sums the vector z (N, H, Dk)."""

    matrix: Tensor
    vector: Tensor | None

    @staticmethod
    def of(state: Tensor | None, normalise: bool) -> _State | None:
        if state is None:
            return None
        state = state.float()
        if not normalise:
            return _State(state.contiguous(), None)
        return _State(state[..., :-1].contiguous(), state[..., -1].contiguous())

    @staticmethod
    def empty(like: Tensor, *sizes: int, normalise: bool) -> _State:
        matrix = like.new_empty(sizes, dtype=torch.float32)
        return _State(matrix, torch.empty_like(matrix[..., 0]) if normalise else None)

    def whole(self) -> Tensor:
        if self.vector is None:
            return self.matrix
        return torch.cat([self.matrix, self.vector[..., None]], dim=-1)


def _pointers(state: _State | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if state is None else (state.matrix, state.vector)


def _widen(do: Tensor, output: Tensor, sums: Tensor, dsums: Tensor | None) -> tuple[Tensor, Tensor]:
    """1 / D, and the gradient of D: both (B, T, H) float32."""
    V = do.shape[3]
    scale, shift = torch.empty_like(sums), torch.empty_like(sums)
    block = triton.next_power_of_2(V)
    rows = max(1, 4096 // block)
    widen_kernel[(triton.cdiv(sums.numel(), rows),)](
        do.contiguous(), output, sums, dsums, scale, shift, sums.numel(),
        V=V, BLOCK_ROWS=rows, BLOCK_V=block,
    )  # fmt: skip
    return scale, shift


def _channels_last(x: Tensor) -> Tensor:
    """x with its last axis contiguous; any other strides are the kernel's business."""
    return x if x.stride(3) == 1 else x.contiguous()


@functools.cache
def _hardware(device: torch.device) -> tuple[int, int]:
    """Compute capability times ten, and multiprocessors."""
    if device.type != "cuda":
        return 90, 0  # The interpreter: any architecture's tiles, one segment.
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count


def unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernel cannot take these tensors, or None when it can."""
    if kind(q) != "cuda" and not INTERPRETED:
        return f"the Triton kernel needs CUDA tensors, and these are on '{q.device.type}'"
    if max(q.shape[3], v.shape[3]) > LARGEST_HEAD:
        return f"the Triton kernel takes at most {LARGEST_HEAD} channels a head"
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernel does not take {q.dtype}"
    if (
        kind(q) == "cuda"
        and q.dtype == torch.float32
        and torch.get_float32_matmul_precision() == "highest"
    ):
        return (
            "the Triton kernel multiplies float32 as TF32, which "
            "torch.set_float32_matmul_precision('highest') forbids"
        )
    if q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "the Triton kernel needs compute capability 8.0 or newer"
    return None


# --- the operator, with gradients -------------------------------------------------------------


@torch.library.custom_op("supra::linear_attention_triton", mutates_args=())
def linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As :class:`~supra_torch.ops.linear_attention.Operator` says."""
    problem = _Problem.of(q, slope, mask, cu_seqlens, normalise)
    B, T, H, Dk = q.shape
    sums = q.new_zeros((B, T, H) if normalise else (0,), dtype=torch.float32)
    state = _State.empty(q, problem.sequences, H, Dk, v.shape[3], normalise=normalise)
    initial = _State.of(initial_state, normalise)
    output, _ = _scan(problem, "output", q, k, v, sums=sums, initial=initial, final=state)
    return output, sums, state.whole()


@linear_attention_triton.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, initial_state: Tensor | None,
    mask: Tensor | None, cu_seqlens: Tensor | None, normalise: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, T, H, Dk = q.shape
    Dv = v.shape[3]
    sequences = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        q.new_empty(B, T, H, Dv),
        q.new_empty((B, T, H) if normalise else (0,), dtype=torch.float32),
        q.new_empty(sequences, H, Dk, Dv + normalise, dtype=torch.float32),
    )


@torch.library.custom_op("supra::linear_attention_triton_backward", mutates_args=())
def linear_attention_triton_backward(
    do: Tensor,
    dsums: Tensor | None,
    dstate: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slope: Tensor,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    output: Tensor,
    sums: Tensor,
    state: Tensor,
    slope_gradient: bool,
    state_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, slope and initial_state; the last two empty unless asked for."""
    normalise = sums.numel() > 0
    problem = _Problem.of(q, slope, mask, cu_seqlens, normalise)
    do = do.to(q.dtype)
    scale = shift = None
    if normalise:
        scale, shift = _widen(do, output, sums, None if dsums is None else dsums.contiguous())
    initial, dfinal = _State.of(initial_state, normalise), _State.of(dstate, normalise)
    dinitial = None
    if state_gradient:
        sizes = (*state.shape[:3], v.shape[3])
        dinitial = _State.empty(q, *sizes, normalise=normalise)
    dq, q_dots = _scan(
        problem, "dq", do, v, k, scale=scale, shift=shift, initial=initial,
        partner=q if slope_gradient else None,
    )  # fmt: skip
    dk, k_dots = _scan(
        problem, "dk", v, do, q, scale=scale, shift=shift, initial=dfinal,
        final=dinitial, partner=k if slope_gradient else None,
    )  # fmt: skip
    dv, _ = _scan(problem, "dv", k, q, do, scale=scale, shift=shift, initial=dfinal)
    dslope = q.new_empty(0, dtype=torch.float32)
    if slope_gradient:
        assert q_dots is not None
        assert k_dots is not None
        dslope = _slope_gradient(q_dots - k_dots, mask, cu_seqlens, state, dstate)
    return (
        dq,
        _sum_groups(dk, k.shape[2]),
        _sum_groups(dv, v.shape[2]),
        dslope,
        q.new_empty(0, dtype=torch.float32) if dinitial is None else dinitial.whole(),
    )


@linear_attention_triton_backward.register_fake
def _(
    do: Tensor, dsums: Tensor | None, dstate: Tensor | None, q: Tensor, k: Tensor, v: Tensor,
    slope: Tensor, initial_state: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None,
    output: Tensor, sums: Tensor, state: Tensor, slope_gradient: bool, state_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    nothing = q.new_empty(0, dtype=torch.float32)
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        slope.new_empty(slope.shape) if slope_gradient else nothing,
        state.new_empty(state.shape) if state_gradient else q.new_empty(0, dtype=torch.float32),
    )


def _sum_groups(gradient: Tensor, heads: int) -> Tensor:
    """(B, T, H, D) -> (B, T, heads, D), summed over each group in float32."""
    if gradient.shape[2] == heads:
        return gradient
    groups = gradient.unflatten(2, (heads, -1))
    return groups.sum(3, dtype=torch.float32).to(gradient.dtype)


def _slope_gradient(
    dots: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    state: Tensor,
    dstate: Tensor | None,
) -> Tensor:
    """The gradient of -ln gamma (H,), from dots_t = q_t . dq_t - k_t . dk_t (B, T, H)."""
    ages, ends = _ages(dots, mask, cu_seqlens, state.shape[0])
    # float64: distant tokens' terms are large and cancel.
    total = torch.einsum("bt,bth->h", ages, dots.double())
    if dstate is not None:
        total += torch.einsum("n,nhkv->h", ends, (state * dstate).double())
    return -total.float()


def _ages(
    dots: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, sequences: int
) -> tuple[Tensor, Tensor]:
    """Valid tokens of its sequence up to each token (B, T), and in each (N,), float64."""
    B, T = dots.shape[:2]
    valid = torch.ones(B, T, device=dots.device) if mask is None else mask
    ages = valid.cumsum(1, dtype=torch.float64)
    if cu_seqlens is None:
        return ages, ages[:, -1]
    borders = cu_seqlens.long()
    counted = F.pad(ages[0], (1, 0))[borders]  # tokens before each border
    place = torch.arange(T, device=dots.device)
    sequence = torch.searchsorted(borders[1:], place, right=True).clamp(max=sequences - 1)
    return ages - counted[sequence][None], counted.diff()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, slope, initial_state, mask, cu_seqlens, normalise = inputs
    # The state has no gradient in most steps: none is made of zeros and read.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, slope, initial_state, mask, cu_seqlens, *output)


def _backward(ctx: Any, do: Tensor | None, dsums: Tensor | None, dstate: Tensor | None) -> Any:
    q, k, v, slope, initial_state, mask, cu_seqlens, output, sums, state = ctx.saved_tensors
    needs = ctx.needs_input_grad
    do = torch.zeros_like(output) if do is None else do
    dq, dk, dv, dslope, dinitial = linear_attention_triton_backward(
        do, dsums if sums.numel() else None, dstate, q, k, v, slope, initial_state, mask,
        cu_seqlens, output, sums, state, needs[3], needs[4],
    )  # fmt: skip
    return (
        dq, dk, dv, dslope if needs[3] else None, dinitial if needs[4] else None, None, None, None,
    )  # fmt: skip


linear_attention_triton.register_autograd(_backward, setup_context=_setup_context)
