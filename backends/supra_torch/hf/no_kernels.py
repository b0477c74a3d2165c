"""In the place of :mod:`supra_torch.ops.kernels` in the file for stock transformers: none."""

from __future__ import annotations

from typing import Any

_NONE = "this file has no Triton kernels"


def scan_kernel(*tensors: Any) -> Any:
    """Why there is no kernel for whole sequences."""
    return _NONE


def why_no_step_kernel(*tensors: Any) -> str | None:
    """Why there is no kernel for a decode step."""
    return _NONE


def step_kernel(*given: Any) -> Any:
    """Never called, since it cannot run."""
    raise NotImplementedError(_NONE)


step_kernel_ = step_kernel
