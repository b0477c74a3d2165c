"""What a user may choose when a transformer's mixers are replaced."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from supra_core.errors import SpecError

FeatureMapName = Literal["relu", "signed_relu", "signed_softmax", "none"]
DecayName = Literal["lightning", "retnet", "none", "learned"]
OutputNormName = Literal["group_norm", "sum", "sum_sink"]


@dataclasses.dataclass(frozen=True)
class Choices:
    """A preset and what differs from it; None leaves a choice to the preset.

    ``window``: tokens that keep softmax weights. ``rope``: where the rotation stands.
    ``feature_bias``: whether feature maps have biases.
    """

    preset: str = "windowed"
    feature_map: FeatureMapName | None = None
    decay: DecayName | None = None
    output_norm: OutputNormName | None = None
    window: int | None = None
    rope: Literal["before", "between", "after"] | None = None
    feature_bias: bool = True
    gain: Literal["none", "per_head", "per_channel"] | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("feature_map", FeatureMapName),
            ("decay", DecayName),
            ("output_norm", OutputNormName),
        ):
            require_known(name, getattr(self, name), get_args(known))
        if self.window is not None and self.window < 1:
            raise SpecError(
                f"`window` must be at least 1 token, not {self.window}: recipe pure has none"
            )


def require_known(name: str, value: str | None, known: tuple[str, ...]) -> None:
    """Raise SpecError that lists what is known, unless ``value`` is among it or None."""
    if value is not None and value not in known:
        raise SpecError(f"`{name}` '{value}' is unknown: use one of {', '.join(known)}")
