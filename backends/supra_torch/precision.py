"""The type that products are taken in."""

from __future__ import annotations

import torch


def resolved_precision(precision: str, device: torch.device) -> str:
    """``auto`` is bf16 where the hardware multiplies it natively, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if native else "float32"
    # Without these instructions bf16 products are emulated and slower than float32.
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if native else "float32"


def product_type(precision: str) -> torch.dtype:
    """The type that a precision's products are taken in."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(device: torch.device, precision: str, *, sharded: bool = False) -> torch.autocast:
    """Products in bfloat16 over float32 weights, for the precision ``bf16``.

    ``sharded``: the bfloat16 weights are not kept for another use, since whole weights are to be
    gone after a layer: 14 GB of a 7B model would stay.
    """
    return torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=precision == "bf16", cache_enabled=not sharded
    )
