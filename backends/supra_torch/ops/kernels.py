"""Our Triton kernels as the dispatchers see them: why one cannot run, and operators to call.

The operators are custom ones, which torch.compile and CUDA graphs take as they are. Triton is
imported when a kernel is first needed. A file for stock transformers has
:mod:`supra_torch.hf.no_kernels` in the place of this module.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Scan = Callable[..., tuple[Tensor, Tensor, Tensor]]
_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton reads it when a kernel is defined; then CPU tensors are what it takes.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
_ABSENT = "triton is not installed"


def scan_kernel(q: Tensor, k: Tensor, v: Tensor) -> Scan | str:
    """Linear attention of whole sequences by Triton, or why it cannot serve."""
    if not _INSTALLED:
        return _ABSENT
    from supra_torch.ops.triton_linear_attention import linear_attention_triton, unsupported

    return unsupported(q, k, v) or linear_attention_triton


def why_no_step_kernel(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, state: Tensor) -> str | None:
    """What keeps the decode step's kernel from running on these tensors, if anything does."""
    if not _INSTALLED:
        return _ABSENT
    if not state.is_cuda and not _INTERPRETED:
        return f"the tensors are on {state.device.type}, not on a CUDA device"
    if any(x.dtype not in _TYPES for x in (q, k, v)):
        return f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}, not of 16 or 32 bits"
    if state.dtype != torch.float32 or slope.dtype != torch.float32:
        return f"state and slope are {state.dtype} and {slope.dtype}, not float32"
    return None if state.is_contiguous() else "the state is not contiguous"


@torch.library.custom_op("supra::linear_attention_step", mutates_args=())
def step_kernel(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, state: Tensor, normalise: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, sums and new state of a decode step."""
    from supra_torch.ops.triton_step import launch

    after = torch.empty_like(state)
    output, sums = launch(q, k, v, slope, state, mask, normalise, after)
    return output, sums, after


@step_kernel.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (*_empty_results(*given), torch.empty_like(given[4]))


@torch.library.custom_op("supra::linear_attention_step_", mutates_args={"state"})
def step_kernel_(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, state: Tensor, normalise: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and sums of a decode step that overwrites the state."""
    from supra_torch.ops.triton_step import launch

    return launch(q, k, v, slope, state, mask, normalise, state)


@step_kernel_.register_fake
def _empty_results(
    q: Tensor, k: Tensor, v: Tensor, slope: Tensor, state: Tensor, normalise: bool,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, H, _ = q.shape
    return q.new_empty(B, H, v.shape[2]), state.new_empty((B, H) if normalise else (0,))
