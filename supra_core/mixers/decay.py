"""Decay slopes: gamma_h = exp(-slope_h), one a head, computed on the host in float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from supra_core.mixers.parts import Decay, Float64, LearnedDecay, LightningDecay, RetnetDecay


def slopes(decay: Decay, heads: int, log_slope: npt.ArrayLike | None = None) -> Float64:
    """The slope of each head, (heads,) float64, >= 0.

    ``log_slope`` is the layer's tensor, needed by a learned decay only.
    """
    if isinstance(decay, LearnedDecay):
        assert log_slope is not None
        return np.asarray(np.exp(np.asarray(log_slope, dtype=np.float64)))
    if isinstance(decay, RetnetDecay):
        # log1p: log(1 - 2^(-5 - h)) rounds to 0 for late heads.
        return np.asarray(-np.log1p(-np.exp2(-5.0 - np.arange(heads))))
    return (
        lightning_slopes(heads, decay.start)
        if isinstance(decay, LightningDecay)
        else np.zeros(heads)
    )


def lightning_slopes(heads: int, start: float | None = None) -> Float64:
    """Slopes of lightning attention (arXiv 2401.04658), with ALiBi's rule for other H.

    H a power of two: s_h = 2^(-8 (h + 1) / H). Otherwise the slopes of the closest lower power
    of two P, then every second slope of the list for 2 P. With ``start``: s_h = start r^h,
    r = 2^(-8 / H).
    """
    if start is not None:
        return np.asarray(start * np.exp2(-8.0 * np.arange(heads) / heads))
    power = 1 << (heads.bit_length() - 1)
    first = np.exp2(-8.0 * np.arange(1, power + 1) / power)
    if power == heads:
        return np.asarray(first)
    doubled = np.exp2(-8.0 * np.arange(1, 2 * power + 1) / (2 * power))
    return np.concatenate([first, doubled[0::2][: heads - power]])
