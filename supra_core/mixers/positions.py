"""Rotary position embedding as a spec states it, with its scalings.

A scaling's ``slowed`` takes the frequencies (pairs,) and the rope's base (transformers,
``modeling_rope_utils``).
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from pydantic.dataclasses import dataclass

from supra_core.mixers.checks import STRICT, require, require_original

Float64 = npt.NDArray[np.float64]

RopeFactors = Literal["short", "long"]


@dataclass(frozen=True, config=STRICT)
class LinearScaling:
    """Positions divided by ``factor`` (Hugging Face ``rope_type: linear``)."""

    factor: float
    kind: Literal["linear"] = "linear"

    def __post_init__(self) -> None:
        require(self.factor > 0, "rope scaling factor must be positive")

    def slowed(self, theta: Float64, base: float) -> Float64:
        return theta / self.factor


@dataclass(frozen=True, config=STRICT)
class Llama3Scaling:
    """The frequency-dependent scaling of Llama 3.1 (Hugging Face ``rope_type: llama3``)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    kind: Literal["llama3"] = "llama3"

    def __post_init__(self) -> None:
        require(self.factor > 0, "rope scaling factor must be positive")
        require(
            0 < self.low_freq_factor < self.high_freq_factor,
            "rope scaling needs 0 < low_freq_factor < high_freq_factor",
        )
        require_original(self.original_max_position_embeddings)

    def slowed(self, theta: Float64, base: float) -> Float64:
        """Slow frequencies are divided by ``factor``, fast ones kept, and others blended."""
        wavelength = 2 * math.pi / theta
        smooth = (self.original_max_position_embeddings / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)
        return np.asarray((1 - smooth) * theta / self.factor + smooth * theta)


@dataclass(frozen=True, config=STRICT)
class YarnScaling:
    """YaRN (arXiv 2309.00071; Hugging Face ``rope_type: yarn``).

    Pairs that turn less than ``beta_slow`` times over the original length are slowed down by
    ``factor``, those that turn more than ``beta_fast`` times are not, and between them it changes
    linearly; ``truncate``: the ends of that range are whole pairs. What rotates is multiplied by
    ``attention_factor``.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    kind: Literal["yarn"] = "yarn"
    format_version: ClassVar[int] = 3

    def __post_init__(self) -> None:
        for name in ("factor", "attention_factor", "beta_fast", "beta_slow"):
            require(getattr(self, name) > 0, f"rope scaling {name} must be positive")
        require_original(self.original_max_position_embeddings)

    def slowed(self, theta: Float64, base: float) -> Float64:
        """Llama 3's blend, by the number of a pair."""
        pairs, length = len(theta), self.original_max_position_embeddings

        def pair_that_turns(times: float) -> float:
            return pairs * math.log(length / (times * 2 * math.pi)) / math.log(base)

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        # As transformers has it, so that nothing is divided by 0.
        width = 0.001 if low == high else high - low
        share = np.clip((np.arange(pairs) - low) / width, 0.0, 1.0)
        return np.asarray(share * theta / self.factor + (1 - share) * theta)


@dataclass(frozen=True, config=STRICT)
class LongropeScaling:
    """LongRoPE (arXiv 2402.13753; Hugging Face ``rope_type: longrope``), with one choice made.

    Each pair of channels is slowed down by a factor of its own. The transformer takes
    ``short_factor`` for texts of up to the original length and ``long_factor`` for longer ones,
    all of whose tokens then turn otherwise; a state cannot be turned again, so that ``factors``
    says which it is at every length. What rotates is multiplied by ``attention_factor``.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float = 1.0
    factors: RopeFactors = "short"
    kind: Literal["longrope"] = "longrope"
    format_version: ClassVar[int] = 3

    def __post_init__(self) -> None:
        require(
            0 < len(self.short_factor) == len(self.long_factor),
            "rope scaling needs as many factors in short_factor as in long_factor",
        )
        for factor in (*self.short_factor, *self.long_factor, self.attention_factor):
            require(factor > 0, "rope scaling factors must be positive")
        require_original(self.original_max_position_embeddings)

    @property
    def chosen(self) -> tuple[float, ...]:
        """The factors that are taken, one for each pair of channels."""
        return self.short_factor if self.factors == "short" else self.long_factor

    def slowed(self, theta: Float64, base: float) -> Float64:
        return np.asarray(theta / np.array(self.chosen))


RopeScaling = Annotated[
    LinearScaling | Llama3Scaling | YarnScaling | LongropeScaling, Field(discriminator="kind")
]


@dataclass(frozen=True, config=STRICT)
class RotaryEmbedding:
    """Rotary position embedding (arXiv 2104.09864).

    ``pairing`` says which channels rotate together: ``half`` pairs channel i with i + d/2
    (Hugging Face), ``interleaved`` pairs 2i with 2i + 1 (the original Llama code).
    ``fraction``: the share of the channels that rotates, the first ones; the rest stay as they
    are (Hugging Face ``partial_rotary_factor``).
    """

    base: float = 10000.0
    pairing: Literal["half", "interleaved"] = "half"
    scaling: RopeScaling | None = None
    fraction: float = 1.0
    later_fields: ClassVar[dict[str, int]] = {"fraction": 2}

    def __post_init__(self) -> None:
        require(self.base > 0, "rope base must be positive")
        require(0 < self.fraction <= 1, "rope fraction must be above 0 and at most 1")
        if isinstance(self.scaling, YarnScaling):
            require(self.base > 1, "rope scaling by yarn needs a base above 1")

    @property
    def magnitude(self) -> float:
        """What the rotated channels are multiplied by."""
        return float(getattr(self.scaling, "attention_factor", 1.0))

    def rotated(self, channels: int) -> int:
        """How many of ``channels`` rotate."""
        return int(channels * self.fraction)
