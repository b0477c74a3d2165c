"""The published SUPRA config (OpenLM, linear_open_lm) to a spec, and back.

The training code and the hub form name some fields differently, e.g. ``hidden_dim`` and ``dim``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from supra_core.errors import SpecError
from supra_core.families.shared.features import later_features
from supra_core.families.shared.fields import Fields, layer_count
from supra_core.mixers import Mixer
from supra_core.mixers.linear import LinearAttention
from supra_core.mixers.parts import (
    Decay,
    FeatureMap,
    GroupNorm,
    LightningDecay,
    NoDecay,
    Norm,
    Projection,
    RetnetDecay,
)
from supra_core.mixers.positions import LinearScaling, RotaryEmbedding
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.spec import LayerSpec, ModelSpec, Provenance

_NORMS = {
    "rms_norm": "rms_norm",
    "gain_only_lp_layer_norm": "layer_norm",
    "gain_only_layer_norm": "layer_norm",
}
_SOFTMAX_NAMES = ("auto", "torch_attn", "xformers_attn", "xformers_attn_variable_length")
_PAIRINGS = {"rotary": "half", "llama_rotary": "interleaved"}
_GROUP_NORM_EPS = 1e-5  # PyTorch's default, which the published code uses.

# The layout stores no token ids. Mistral's vocabulary has this size and these ids; the published
# uptraining data ends documents with id 0, so generation must stop there too.
_MISTRAL_VOCABULARY = 32000
_MISTRAL_BOS, _MISTRAL_EOS = 1, (2, 0)


def is_config(config: Mapping[str, Any]) -> bool:
    """Whether this is an OpenLM config, with or without a ``model_type``."""
    if config.get("model_type") is not None:
        return bool(config["model_type"] == "openlm")
    return "n_heads" in config and ("dim" in config or "hidden_dim" in config)


def config_to_spec(config: dict[str, Any], where: str) -> ModelSpec:
    """The spec of an OpenLM config; ``where`` names its file in errors."""
    fields = Fields(config, where)
    _refuse_unsupported(fields)
    hidden, heads = fields.integer("dim", "hidden_dim"), fields.integer("n_heads")
    if hidden % heads:
        raise fields.error(f"the hidden size ({hidden}) is not a multiple of n_heads ({heads})")
    key_value_heads = fields.integer("n_heads_kv", default=heads)
    norm = fields.text("norm_type", "model_norm", default="default_layer_norm")
    if norm not in _NORMS:
        raise fields.error(f"the norm '{norm}' is not supported: known are {', '.join(_NORMS)}")
    size = fields.integer("qk_head_dim", default=hidden // heads)
    mixer = _mixer(fields, size, shared=key_value_heads == heads)
    linear = mixer.converted
    vocabulary = fields.integer("vocab_size")
    mistral = linear and vocabulary == _MISTRAL_VOCABULARY
    bos, eos = fields.token("bos_token_id"), fields.tokens("eos_token_id")
    try:
        return ModelSpec(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=fields.integer("intermediate_dim_ffn", default=_ffn_width(hidden)),
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            head_dim=hidden // heads if linear else size,
            value_head_dim=fields.integer("v_head_dim", default=hidden // heads),
            layers=(LayerSpec(mixer),) * layer_count(fields, "n_layers"),
            norm=Norm(_NORMS[norm], fields.number("norm_eps", default=1e-5)),  # type: ignore[arg-type]
            rope=_rotary(fields),
            tie_word_embeddings=fields.flag("weight_tying", default=False),
            embedding_norm=fields.flag("post_embed_norm", default=False),
            max_position_embeddings=fields.integer("seq_len", default=2048),
            bos_token_id=_MISTRAL_BOS if bos is None and mistral else bos,
            eos_token_id=_MISTRAL_EOS if not eos and mistral else eos,
            pad_token_id=fields.token("pad_token_id"),
            provenance=Provenance(family="openlm", recipe="paper" if linear else ""),
        )
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from None


def spec_to_config(spec: ModelSpec) -> dict[str, Any]:
    """The OpenLM config of ``spec``, under the training code's names.

    :class:`SpecError` says in one sentence what the layout cannot express.
    """
    mixers = {layer.mixer for layer in spec.layers}
    if len(mixers) > 1:
        raise _inexpressible("layers that differ")
    mixer = next(iter(mixers))
    config: dict[str, Any] = {
        "architectures": ["OpenLMForCausalLM"],
        "model_type": "openlm",
        "hidden_dim": spec.hidden_size,
        "intermediate_dim_ffn": spec.intermediate_size,
        "n_layers": spec.num_hidden_layers,
        "n_heads": spec.num_attention_heads,
        "n_heads_kv": spec.num_key_value_heads,
        "seq_len": spec.max_position_embeddings,
        "vocab_size": spec.vocab_size,
        "post_embed_norm": spec.embedding_norm,
        "weight_tying": spec.tie_word_embeddings,
        "qk_norm": False,
        "v_head_dim": spec.value_head_dim,
        "model_norm": "rms_norm" if spec.norm.kind == "rms_norm" else "gain_only_lp_layer_norm",
        "norm_eps": spec.norm.eps,
        "ffn_type": "swiglu",
        **_rotary_config(spec),
        **_mixer_config(spec, mixer),
    }
    if spec.attention_bias != "none":
        raise _inexpressible("attention biases")
    for feature in sorted(later_features(spec)):
        raise _inexpressible(feature)
    ids = {
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": list(spec.eos_token_id) or None,
        "pad_token_id": spec.pad_token_id,
    }
    return config | {name: value for name, value in ids.items() if value is not None}


def _refuse_unsupported(fields: Fields) -> None:
    ffn = fields.text("ffn_type", default="swiglu")
    if ffn not in ("swiglu", "swiglu_torch"):
        raise fields.error(f"field ffn_type is '{ffn}', but only swiglu is supported")
    if fields.values.get("moe_freq", 0) not in (0, None):
        raise fields.error("field moe_freq states a mixture of experts, which is not supported")


def _ffn_width(hidden: int) -> int:
    """256 ceil(int(8 D / 3) / 256), the default of ``intermediate_dim_ffn``."""
    return 256 * ((int(8 * hidden / 3) + 255) // 256)


def _mixer(fields: Fields, size: int, shared: bool) -> Mixer:
    name = fields.text("attn_name", default="auto")
    qk_norm = fields.flag("apply_qk_norm", "qk_norm", default=False)
    positions = fields.text("positional_embedding_type", default="rotary")
    if positions not in (*_PAIRINGS, "none"):
        raise fields.error(
            f"field positional_embedding_type is '{positions}', which is not supported: known "
            f"are {', '.join(_PAIRINGS)} and none"
        )
    if name in _SOFTMAX_NAMES:
        if qk_norm or positions == "none":
            raise fields.error(
                "softmax attention with a q/k norm or without rotary positions is not supported"
            )
        return SoftmaxAttention()
    if name != "linear_attn":
        raise fields.error(
            f"field attn_name is '{name}', which is not supported: known are linear_attn, "
            f"{', '.join(_SOFTMAX_NAMES)}"
        )
    return LinearAttention(
        feature_map=FeatureMap("relu", size, Projection("all_heads", shared=shared, bias=True)),
        rope_position="none" if positions == "none" else "after",
        decay=_decay(fields),
        normaliser=GroupNorm(_GROUP_NORM_EPS),
        key_scale=size**-0.5,
        qk_norm=qk_norm,
    )


def _decay(fields: Fields) -> Decay:
    if not fields.flag("use_decay", default=False):
        return NoDecay()
    if fields.flag("use_retnet_slopes", default=False):
        return RetnetDecay()
    return LightningDecay(fields.number("decay_start") if fields.has("decay_start") else None)


def _rotary(fields: Fields) -> RotaryEmbedding:
    scale = fields.number("rotary_scale", default=1.0)
    positions = fields.text("positional_embedding_type", default="rotary")
    return RotaryEmbedding(
        base=fields.number("rotary_base_frequency", default=10000.0),
        pairing=_PAIRINGS.get(positions, "half"),  # type: ignore[arg-type]
        scaling=None if scale == 1.0 else LinearScaling(scale),
    )


def _rotary_config(spec: ModelSpec) -> dict[str, Any]:
    names = {pairing: name for name, pairing in _PAIRINGS.items()}
    config: dict[str, Any] = {"positional_embedding_type": names[spec.rope.pairing]}
    if spec.rope.base != 10000.0:
        whole = spec.rope.base.is_integer()
        config["rotary_base_frequency"] = int(spec.rope.base) if whole else spec.rope.base
    if isinstance(spec.rope.scaling, LinearScaling):
        config["rotary_scale"] = spec.rope.scaling.factor
    elif spec.rope.scaling is not None:
        raise _inexpressible("Llama 3 rope scaling")
    return config


def _mixer_config(spec: ModelSpec, mixer: Mixer) -> dict[str, Any]:
    if spec.head_dim * spec.num_attention_heads != spec.hidden_size:
        raise _inexpressible("heads that do not divide the hidden size")
    if type(mixer) not in _MIXER_CONFIGS:
        raise _inexpressible(f"the mixer {mixer.kind}")
    return _MIXER_CONFIGS[type(mixer)](spec, mixer)


def _softmax_config(spec: ModelSpec, mixer: SoftmaxAttention) -> dict[str, Any]:
    if mixer.window is not None:
        raise _inexpressible("a sliding window")
    return {"qk_head_dim": spec.head_dim, "attn_name": "torch_attn"}


def _linear_config(spec: ModelSpec, mixer: LinearAttention) -> dict[str, Any]:
    _refuse_inexpressible(spec, mixer)
    return {
        "qk_head_dim": mixer.feature_map.size,
        "attn_name": "linear_attn",
        "qk_norm": mixer.qk_norm,
        **({"positional_embedding_type": "none"} if mixer.rope_position == "none" else {}),
        **_DECAYS[mixer.decay.kind],
        "decay_start": getattr(mixer.decay, "start", None),
    }


_MIXER_CONFIGS: dict[type, Callable[[ModelSpec, Any], dict[str, Any]]] = {
    SoftmaxAttention: _softmax_config,
    LinearAttention: _linear_config,
}
_DECAYS = {
    "none": {"use_decay": False, "use_retnet_slopes": False},
    "lightning": {"use_decay": True, "use_retnet_slopes": False},
    "retnet": {"use_decay": True, "use_retnet_slopes": True},
}


def _refuse_inexpressible(spec: ModelSpec, mixer: LinearAttention) -> None:
    equal_heads = spec.num_attention_heads == spec.num_key_value_heads
    size = mixer.feature_map.size
    published = FeatureMap("relu", size, Projection("all_heads", shared=equal_heads, bias=True))
    problems = {
        "another feature map than the published one": mixer.feature_map != published,
        f"rope {mixer.rope_position} the feature map": mixer.rope_position not in ("after", "none"),
        "rope over features of another size than head_dim": (
            mixer.rope_position == "after" and size != spec.head_dim
        ),
        f"{mixer.decay.kind} decay": not _DECAYS.get(mixer.decay.kind),
        "another output norm than GroupNorm(1e-5)": mixer.normaliser != GroupNorm(_GROUP_NORM_EPS),
        "another key scale than Dk^-1/2": mixer.key_scale != size**-0.5,
        "a gain": mixer.gain != "none",
        "a window": mixer.window is not None,
    }
    for problem, present in problems.items():
        if present:
            raise _inexpressible(problem)


def _inexpressible(problem: str) -> SpecError:
    return SpecError(f"the OpenLM layout cannot express {problem}: write the model as supra")
