"""A transformer's spec and weights -> a converted one's spec and initial weights.

The kinds of mixers offer the presets, see :data:`supra_core.mixers.PRESETS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from supra_core.errors import SpecError
from supra_core.mixers import PRESETS
from supra_core.mixers.choices import Choices, require_known
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.layout import layer_prefix, tensor_shapes
from supra_core.model.spec import ModelSpec
from supra_core.tensors import LazyTensor, TensorSource


@dataclass(frozen=True)
class LinearizeOptions(Choices):
    """What is chosen for the mixers, and which layers keep the transformer's.

    ``keep_softmax``: their numbers; ``keep_softmax_every``: every Nth layer too. ``seed``: of the
    random weights of a preset that has any.
    """

    keep_softmax: tuple[int, ...] = ()
    keep_softmax_every: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_known("preset", self.preset, tuple(PRESETS))
        if self.seed < 0:
            raise SpecError(f"`seed` must be at least 0, not {self.seed}")


def linearize(
    spec: ModelSpec, tensors: Mapping[str, LazyTensor], options: LinearizeOptions
) -> tuple[ModelSpec, TensorSource]:
    """The converted model's spec and weights; kept weights stay lazy.

    Raises SpecError when the source is no transformer or a choice is impossible.
    """
    linear, new = linear_spec(spec, options), dict(tensors)
    for index, mixer in enumerate(linear.mixers):
        generator = np.random.default_rng(options.seed + index)
        for name, shape in mixer.new_tensors(spec).items():
            array = mixer.initial(name, shape, spec, generator).astype(np.float32)
            new[f"{layer_prefix(index)}self_attn.{name}"] = LazyTensor.of(array)
    return linear, {name: new[name] for name in tensor_shapes(linear)}


def linear_spec(spec: ModelSpec, options: LinearizeOptions) -> ModelSpec:
    """The converted model's spec; raises as :func:`linearize`."""
    if not spec.is_transformer:
        raise SpecError(
            "the source already has linear attention: convert it with `linearize=False`, or "
            "start from the transformer"
        )
    layers, every = spec.num_hidden_layers, options.keep_softmax_every
    wrong = [index for index in options.keep_softmax if not 0 <= index < layers]
    if wrong:
        raise SpecError(
            f"`keep_softmax` names layer {wrong[0]}, but the model has layers 0 to {layers - 1}"
        )
    # The last of every N layers, so that the first ones of a model are linear.
    kept = {*options.keep_softmax, *(range(every - 1, layers, every) if every else ())}
    if len(kept) == layers:
        raise SpecError(
            f"`keep_softmax` names all {layers} layers, and nothing would be linear: omit at least "
            "one"
        )
    mixer = PRESETS[options.preset].chosen(spec, options)
    own = spec.mixers
    mixers = [m if i in kept else mixer.rotating(m.rotary) for i, m in enumerate(own)]
    plain = all(own[i] == SoftmaxAttention() for i in range(layers) if i not in kept)
    provenance = replace(
        spec.provenance, recipe=options.preset, replaced_mixers=() if plain else own
    )
    return replace(spec.with_mixers(mixers), provenance=provenance)
