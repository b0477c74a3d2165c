"""The transformer that a model was made from: its spec, and what the model does without."""

from __future__ import annotations

from supra_core.mixers.positions import LongropeScaling
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.spec import ModelSpec


def original_spec(spec: ModelSpec) -> ModelSpec:
    """What a linearized model was made from: softmax attention where it is linear now."""
    replaced = spec.provenance.replaced_mixers or (SoftmaxAttention(),) * spec.num_hidden_layers
    mixers = [layer.mixer for layer in spec.layers]
    return spec.with_mixers(
        [
            theirs if mixer.converted else mixer
            for mixer, theirs in zip(mixers, replaced, strict=True)
        ]
    )


def left_out(spec: ModelSpec) -> tuple[str, ...]:
    """What the transformer's layers had and the linear ones cannot, one sentence each."""
    linear = [i for i, layer in enumerate(spec.layers) if layer.mixer.converted]
    sentences = []
    if linear and spec.attention_softcap is not None:
        sentences.append(
            f"The transformer caps its attention scores at {spec.attention_softcap:g} by a tanh; "
            f"{len(linear)} linear layers do without, because their weights are no function of a "
            "score."
        )
    scaling = spec.rope.scaling
    if linear and isinstance(scaling, LongropeScaling):
        length = scaling.original_max_position_embeddings
        sentences.append(
            f"The transformer turns texts of more than {length:,} tokens by other factors than "
            f"shorter ones (longrope); this model turns all by the {scaling.factors} ones, because "
            "its state cannot be turned again."
        )
    replaced = spec.provenance.replaced_mixers
    sliding = [i for i in linear if replaced and replaced[i].window is not None]
    if sliding:
        windows = ", ".join(str(w) for w in sorted({replaced[i].window or 0 for i in sliding}))
        sentences.append(
            f"{len(sliding)} of the linear layers stand for sliding attention over {windows} "
            "tokens; their state holds all earlier tokens, less what decays."
        )
    return tuple(sentences)
