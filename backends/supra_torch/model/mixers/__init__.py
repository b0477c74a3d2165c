"""The mixers, a file each. A new kind is a file here and an entry in ``MODULES``."""

from __future__ import annotations

from supra_core.errors import SpecError
from supra_core.mixers.base import MixerKind, ModelFields
from supra_core.mixers.linear import LinearAttention
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.mixers.window import WindowAttention
from supra_torch.model.mixers.base import MixerModule
from supra_torch.model.mixers.linear import LinearMixer
from supra_torch.model.mixers.softmax import SoftmaxMixer
from supra_torch.model.mixers.window import WindowMixer

MODULES: dict[type[MixerKind], type[MixerModule]] = {
    SoftmaxAttention: SoftmaxMixer,
    LinearAttention: LinearMixer,
    WindowAttention: WindowMixer,
}


def mixer_module(spec: ModelFields, kind: MixerKind) -> MixerModule:
    """The module of a mixer; SpecError for a kind that this backend has no module of."""
    if type(kind) not in MODULES:
        known = ", ".join(str(known.kind) for known in MODULES)
        raise SpecError(f"the torch backend has no mixer '{kind.kind}': it knows {known}")
    return MODULES[type(kind)](spec, kind)  # type: ignore[call-arg]
