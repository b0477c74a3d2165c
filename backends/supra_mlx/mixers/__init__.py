"""The kinds of mixers in MLX, a file each. A new kind is a file here and an entry in ``MIXERS``."""

from __future__ import annotations

from supra_core.errors import SpecError
from supra_core.mixers import Mixer
from supra_core.mixers.base import MixerKind
from supra_core.mixers.linear import LinearAttention
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.mixers.window import WindowAttention
from supra_core.model.spec import ModelSpec
from supra_mlx.mixers.base import MixerModule
from supra_mlx.mixers.linear import LinearMixer
from supra_mlx.mixers.softmax import SoftmaxMixer
from supra_mlx.mixers.window import WindowMixer

MIXERS: dict[type[MixerKind], type[MixerModule]] = {
    SoftmaxAttention: SoftmaxMixer,
    LinearAttention: LinearMixer,
    WindowAttention: WindowMixer,
}


def mixer_module(spec: ModelSpec, mixer: Mixer) -> MixerModule:
    """The module of a layer's mixer; SpecError for a kind that MLX has not."""
    if type(mixer) not in MIXERS:
        raise SpecError(f"MLX has no mixer {mixer.kind}: use another backend")
    return MIXERS[type(mixer)](spec, mixer)
