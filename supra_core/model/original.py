"""The transformer that a model was made from: its spec, and what the model does without."""

from __future__ import annotations

from supra_core.mixers.positions import LongropeScaling
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.spec import ModelSpec


def original_spec(spec: ModelSpec) -> ModelSpec:
    """The transformer's spec: its own mixers in the place of converted ones."""
    theirs = spec.provenance.replaced_mixers or (SoftmaxAttention(),) * spec.num_hidden_layers
    pairs = zip(spec.mixers, theirs, strict=True)
    return spec.with_mixers([own if mixer.converted else mixer for mixer, own in pairs])


def left_out(spec: ModelSpec) -> tuple[str, ...]:
    """What the transformer's layers had and the converted ones cannot, one sentence each."""
    both = zip(spec.mixers, original_spec(spec).mixers, strict=True)
    pairs = [(ours, own) for ours, own in both if ours.converted]
    uncapped = [ours for ours, _ in pairs if not ours.caps_scores]
    sliding = [own.window for ours, own in pairs if ours.holds_all and not own.holds_all]
    forgetful = [ours for ours, own in pairs if own.holds_all and not ours.holds_all]
    scaling, sentences = spec.rope.scaling, []
    if uncapped and spec.attention_softcap is not None:
        sentences.append(
            f"The transformer caps its attention scores at {spec.attention_softcap:g} by a tanh; "
            f"{len(uncapped)} linear layers do without, because their weights are no function of a "
            "score."
        )
    if pairs and isinstance(scaling, LongropeScaling):
        length = scaling.original_max_position_embeddings
        sentences.append(
            f"The transformer turns texts of more than {length:,} tokens by other factors than "
            f"shorter ones (longrope); this model turns all by the {scaling.factors} ones, because "
            "its state cannot be turned again."
        )
    if sliding:
        windows = ", ".join(str(window) for window in sorted({window or 0 for window in sliding}))
        sentences.append(
            f"{len(sliding)} of the linear layers stand for sliding attention over {windows} "
            "tokens; their state holds all earlier tokens, less what decays."
        )
    if forgetful:
        kinds = "; ".join(dict.fromkeys(mixer.describe(spec) for mixer in forgetful))
        sentences.append(
            f"The transformer's layers see every token; {len(forgetful)} of this model's forget "
            f"what leaves their window ({kinds})."
        )
    return tuple(sentences)
