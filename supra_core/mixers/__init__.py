"""The kinds of mixers, one file each. A new kind is a file here and an entry in ``KINDS``.

``Mixer`` stands for any of them. A type checker sees what all kinds answer; a reader of a spec
sees the union, which tells kinds apart by ``kind`` and refuses unknown ones.
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
