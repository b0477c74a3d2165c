"""95 % confidence intervals of what is measured on a sample."""

from __future__ import annotations

import math

# The two-sided 95 % quantile of the normal distribution.
Z95 = 1.959963984540054


def around(mean: float, standard_error: float) -> tuple[float, float]:
    """mean +- 1.96 standard errors."""
    return mean - Z95 * standard_error, mean + Z95 * standard_error


def of_share(right: float, total: int) -> tuple[float, float]:
    """Wilson's score interval of a share, which stays sensible at 0 and 1 (Wilson, 1927)."""
    if total < 1:
        raise ValueError("a share needs at least one trial")
    share, z2 = right / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    spread = math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) * Z95 / (1 + z2 / total)
    # Rounding must not push a bound past the share itself, 0 and 1 included.
    return min(max(0.0, centre - spread), share), max(min(1.0, centre + spread), share)
