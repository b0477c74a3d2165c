"""The kinds of mixers, a file each. A new kind is a file here and an entry in ``KINDS``.

``Mixer`` is any of them: to a type checker what all answer, and when a spec is read the union that
tells them apart by ``kind`` and refuses others.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from supra_core.mixers.base import MixerKind
from supra_core.mixers.linear import LinearAttention
from supra_core.mixers.softmax import SoftmaxAttention

KINDS: tuple[type[MixerKind], ...] = (SoftmaxAttention, LinearAttention)

if TYPE_CHECKING:
    Mixer = MixerKind
else:
    Mixer = Annotated[reduce(or_, KINDS), Field(discriminator="kind")]

# The kind that each preset of a conversion makes.
PRESETS = {preset: kind for kind in KINDS for preset in kind.presets}

# Read and written in float32 whatever the model's type: small, and their rounding is not.
FLOAT32_TENSORS = tuple(name for kind in KINDS for name in kind.float32_tensors)
