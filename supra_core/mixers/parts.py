"""What mixers are made of: feature maps, decays, normalisers and norms."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from pydantic.dataclasses import dataclass

from supra_core.mixers.checks import LARGEST_SIZE, STRICT, require

Float64 = npt.NDArray[np.float64]


def softmax(z: Float64) -> Float64:
    """The softmax over the last axis."""
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


@dataclass(frozen=True, config=STRICT)
class Projection:
    """The learned part of a feature map: z -> W z + b.

    ``scope``: one W over all heads together (published SUPRA) or one W for each head.
    ``shared``: q and k use the same W and b (needs as many key/value heads as query heads).
    """

    scope: Literal["all_heads", "per_head"]
    shared: bool = False
    bias: bool = True
    kind: Literal["projection"] = "projection"


@dataclass(frozen=True, config=STRICT)
class Folded:
    """The learned part was multiplied into q_proj and k_proj; a bias may remain there."""

    bias: bool = True
    kind: Literal["folded"] = "folded"


@dataclass(frozen=True, config=STRICT)
class Identity:
    """No learned part: the activation acts on q and k themselves."""

    kind: Literal["identity"] = "identity"


FeatureProjection = Annotated[Projection | Folded | Identity, Field(discriminator="kind")]


@dataclass(frozen=True, config=STRICT)
class FeatureMap:
    """phi(z) = activation(projection(z)).

    ``size``: outputs of the projection for a head. ``activation``:

    - ``relu``: max(z, 0), Dk = size (published SUPRA);
    - ``signed_relu``: [max(z, 0), max(-z, 0)], Dk = 2 size;
    - ``signed_softmax``: [softmax(z), softmax(-z)], Dk = 2 size (Hedgehog, arXiv 2402.04347);
    - ``none``: z itself, Dk = size.
    """

    activation: Literal["relu", "signed_relu", "signed_softmax", "none"]
    size: int
    projection: FeatureProjection

    def __post_init__(self) -> None:
        require(self.size > 0, "feature map size must be positive")
        require(self.size <= LARGEST_SIZE, f"feature map size must be at most {LARGEST_SIZE}")

    @property
    def output_size(self) -> int:
        """Features a head, Dk."""
        return 2 * self.size if self.activation.startswith("signed_") else self.size

    @property
    def positive(self) -> bool:
        """Whether every feature is >= 0."""
        return self.activation != "none"

    def activate(self, z: Float64) -> Float64:
        """z (..., size) -> (..., Dk)."""
        if self.activation == "relu":
            return np.maximum(z, 0.0)
        if self.activation == "signed_relu":
            return np.concatenate([np.maximum(z, 0.0), np.maximum(-z, 0.0)], axis=-1)
        if self.activation == "signed_softmax":
            return np.concatenate([softmax(z), softmax(-z)], axis=-1)
        return z


@dataclass(frozen=True, config=STRICT)
class NoDecay:
    """gamma = 1 for every head."""

    kind: Literal["none"] = "none"


@dataclass(frozen=True, config=STRICT)
class LightningDecay:
    """gamma_h = exp(-s_h), s_h = 2^(-8 (h + 1) / H) or, with ``start``, start 2^(-8 h / H).

    For H that is no power of two the slopes follow ALiBi's rule (arXiv 2108.12409).
    """

    start: float | None = None
    kind: Literal["lightning"] = "lightning"

    def __post_init__(self) -> None:
        require(self.start is None or self.start > 0, "decay start must be positive")


@dataclass(frozen=True, config=STRICT)
class RetnetDecay:
    """gamma_h = 1 - 2^(-5 - h) (RetNet, arXiv 2307.08621)."""

    kind: Literal["retnet"] = "retnet"


@dataclass(frozen=True, config=STRICT)
class LearnedDecay:
    """gamma_h = exp(-exp(a_h)), a the layer's tensor ``self_attn.log_slope`` (H,) float32."""

    kind: Literal["learned"] = "learned"


Decay = Annotated[
    NoDecay | LightningDecay | RetnetDecay | LearnedDecay, Field(discriminator="kind")
]


@dataclass(frozen=True, config=STRICT)
class GroupNorm:
    """Each head's output is normalised by its own mean and variance; no parameters."""

    eps: float = 1e-5
    kind: Literal["group_norm"] = "group_norm"


@dataclass(frozen=True, config=STRICT)
class SumNormaliser:
    """Each output is divided by the sum of its weights, as in softmax attention.

    ``sink``: adds exp(``self_attn.log_sink``) to the sum, the weight of a token without a value, so
    that a head can attend to nothing (arXiv 2309.17453; learned as in gpt-oss). With a window it
    counts once tokens before the window have a weight.
    """

    sink: bool = False
    kind: Literal["sum"] = "sum"


Normaliser = Annotated[GroupNorm | SumNormaliser, Field(discriminator="kind")]


@dataclass(frozen=True, config=STRICT)
class Norm:
    """RMSNorm, or LayerNorm with a gain and no bias; eps is added to the mean square/variance.

    The gain is the stored weight plus ``weight_offset`` (Gemma's is 1).
    """

    kind: Literal["rms_norm", "layer_norm"] = "rms_norm"
    eps: float = 1e-5
    weight_offset: float = 0.0
    later_fields: ClassVar[dict[str, int]] = {"weight_offset": 2}

    def __post_init__(self) -> None:
        require(self.eps >= 0, "norm eps must not be negative")

    def normalised(self, x: Float64, weight: Float64) -> Float64:
        """x (..., size) through the norm, over its last axis."""
        if self.kind == "layer_norm":
            x = x - x.mean(axis=-1, keepdims=True)
        gain = weight + self.weight_offset
        return np.asarray(x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + self.eps) * gain)
