"""Hugging Face configs to specs and back; what cannot be expressed is one clear sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from supra_core import families
from supra_core.errors import SpecError
from supra_core.mixers.parts import Norm
from supra_core.mixers.positions import (
    LinearScaling,
    Llama3Scaling,
    LongropeScaling,
    RotaryEmbedding,
)
from supra_core.mixers.rotary import inverse_frequencies
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.spec import LayerSpec, ModelSpec, Provenance

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": [2, 5],
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# What released models' config.json states, as far as it matters, with smaller sizes.
_SMALL: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
RELEASED: dict[str, dict[str, Any]] = {
    "Qwen2.5-0.5B": {
        "model_type": "qwen2", "bos_token_id": 151643, "eos_token_id": 151643,
        "hidden_act": "silu", "max_position_embeddings": 32768, "max_window_layers": 24,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
    },
    "Qwen2.5 beyond 32,768 tokens": {
        "model_type": "qwen2", "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "sliding_window": 131072, "use_sliding_window": False,
        "rope_scaling": {
            "factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn",
        },
    },
    "Phi-3-mini-128k": {
        "model_type": "phi3", "num_key_value_heads": 4, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "rope_theta": 10000.0, "sliding_window": 262144,
        "rope_scaling": {
            "long_factor": [1.07, 4.5, 19.2, 64.7], "short_factor": [1.0, 1.1, 1.6, 2.8],
            "type": "longrope",
        },
    },
    "Phi-4-mini": {
        "model_type": "phi3", "max_position_embeddings": 131072, "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 4096, "sliding_window": 262144,
        "rope_scaling": {
            "long_factor": [1.0, 4.5, 64.7], "short_factor": [1.0, 1.0, 1.0], "type": "longrope",
        },
    },
    "Qwen2.5, sliding": {
        "model_type": "qwen2", "max_window_layers": 2, "sliding_window": 64,
        "use_sliding_window": True, "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "Qwen3-0.6B": {
        "model_type": "qwen3", "attention_bias": False, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "max_window_layers": 28,
        "max_position_embeddings": 40960, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "Qwen3, sliding": {
        "model_type": "qwen3", "use_sliding_window": True, "attention_bias": True,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "Mixtral-8x7B-v0.1": {
        "model_type": "mixtral", "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "hidden_act": "silu", "max_position_embeddings": 32768, "num_experts_per_tok": 2,
        "num_local_experts": 8, "output_router_logits": False, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "Mixtral, defaults": {"model_type": "mixtral"},
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "attention_bias": False, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [],
        "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128,
        "num_experts_per_tok": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False,
    },
    "Qwen3-MoE, mixed": {
        "model_type": "qwen3_moe", "decoder_sparse_step": 2, "mlp_only_layers": [3],
        "use_sliding_window": True, "num_experts": 4, "num_experts_per_tok": 3,
    },
    "Qwen3-MoE, defaults": {"model_type": "qwen3_moe", "num_key_value_heads": 4},
    "Phi-3-mini-4k": {
        "model_type": "phi3", "bos_token_id": 1, "eos_token_id": 32000, "hidden_act": "silu",
        "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
        "pad_token_id": 32000, "rms_norm_eps": 1e-05, "rope_scaling": None,
        "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False,
        "attention_bias": False,
    },
    "SmolLM3-3B": {
        "model_type": "smollm3", "attention_bias": False, "bos_token_id": 128000,
        "eos_token_id": 128012, "hidden_act": "silu", "max_position_embeddings": 65536,
        "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0, 1, 1], "pad_token_id": 128004, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
        "use_sliding_window": False,
    },
    "SmolLM3, defaults": {"model_type": "smollm3"},
    "granite-3.3-2b": {
        "model_type": "granite", "attention_bias": False, "attention_multiplier": 0.015625,
        "bos_token_id": 0, "embedding_multiplier": 12.0, "eos_token_id": 0, "hidden_act": "silu",
        "logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": False,
        "pad_token_id": 0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 10000000.0, "tie_word_embeddings": True,
    },
    "granite, defaults": {"model_type": "granite"},
    "OLMo-2-0425-1B": {
        "model_type": "olmo2", "attention_bias": False, "eos_token_id": 100257,
        "hidden_act": "silu", "max_position_embeddings": 4096, "pad_token_id": 100277,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 500000,
        "tie_word_embeddings": False,
    },
    "OLMo 2, defaults": {"model_type": "olmo2"},
    "gemma-2b": {
        "model_type": "gemma", "attention_bias": False, "bos_token_id": 2, "eos_token_id": 1,
        "head_dim": 256, "hidden_act": "gelu", "max_position_embeddings": 8192,
        "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 10000.0,
        "num_key_value_heads": 1,
    },
    "gemma-2-27b": {
        "model_type": "gemma2", "attn_logit_softcapping": 50.0, "bos_token_id": 2,
        "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 128,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192, "pad_token_id": 0, "query_pre_attn_scalar": 144,
        "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
    },
    "Gemma 2, defaults": {"model_type": "gemma2"},
    "gemma-3-1b": {
        "model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None,
        "bos_token_id": 2, "eos_token_id": [1, 106], "final_logit_softcapping": None,
        "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 7,
        "max_position_embeddings": 32768, "pad_token_id": 0, "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    },
    "Gemma 3, scaled": {
        "model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 2,
    },
    "Gemma 3, defaults": {"model_type": "gemma3_text"},
    "Phi-3, partial": {"model_type": "phi3", "partial_rotary_factor": 0.75},
}  # fmt: skip

SLIDING: dict[str, Any] = {
    "model_type": "qwen3", "use_sliding_window": True, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}  # fmt: skip

MIXTRAL: dict[str, Any] = {"model_type": "mixtral", "num_local_experts": 8}
QWEN: dict[str, Any] = {"model_type": "qwen3_moe"}


def _spec(**changes: Any) -> ModelSpec:
    return families.config_to_spec({**LLAMA, **changes}, "x/config.json")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"eos_token_id": 2, "pad_token_id": 0},
        {"eos_token_id": None, "bos_token_id": None},
        {"tie_word_embeddings": True, "head_dim": 16},
        {"attention_bias": True},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"model_type": "mistral", "sliding_window": 128},
        {"model_type": "mistral", "sliding_window": None},
    ],
)
def test_config_round_trip(changes: dict[str, Any]) -> None:
    spec = _spec(**changes)
    config = families.spec_to_config(spec)
    assert config["model_type"] == changes.get("model_type", "llama")
    assert families.config_to_spec(config, "again") == spec


def test_defaults_follow_transformers() -> None:
    bare = {
        name: value
        for name, value in LLAMA.items()
        if name not in ("num_key_value_heads", "rms_norm_eps", "rope_theta")
    }
    spec = families.config_to_spec(bare, "x")
    assert (spec.num_key_value_heads, spec.head_dim) == (4, 8)
    assert (spec.norm.eps, spec.rope.base) == (1e-6, 10000.0)
    mistral = {**bare, "model_type": "mistral", "num_attention_heads": 16, "hidden_size": 64}
    spec = families.config_to_spec(mistral, "x")
    assert spec.num_key_value_heads == 8
    assert spec.layers[0].mixer == SoftmaxAttention(window=4096)


def test_old_and_new_rope_fields_agree() -> None:
    new = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    for scaling in ({"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}, LLAMA3):
        old = _spec(rope_scaling=None if scaling["rope_type"] == "default" else scaling)
        parameters = {**scaling, "rope_theta": 500000.0}
        assert families.config_to_spec({**new, "rope_parameters": parameters}, "x") == old
    assert _spec(rope_scaling=LLAMA3).rope.scaling == Llama3Scaling(8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "field model_type is 'gpt2', which is unknown: known are "),
        ({"model_type": None}, "field model_type is missing: known are "),
        ({"hidden_size": None}, "field hidden_size is missing"),
        ({"vocab_size": "many"}, "field vocab_size must be a positive integer, not 'many'"),
        ({"num_hidden_layers": 0}, "field num_hidden_layers must be a positive integer"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "is not a multiple of"),
        ({"hidden_act": "gelu"}, "field hidden_act is 'gelu'"),
        ({"mlp_bias": 1}, "field mlp_bias"),
        ({"attention_bias": "yes"}, "field attention_bias must be true or false"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "ntk"}}, "rope_type 'ntk' is not supported: known are def"),
        (
            {"rope_scaling": {"type": "dynamic"}},
            "'dynamic' is not supported, because its rot",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "field rope_scaling: field factor is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}}, "truncate must be true"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}, "rope_theta": 1}, "a base above 1"),
        ({"rope_scaling": {"type": "linear"}}, "field rope_scaling: field factor is missing"),
        ({"rope_parameters": {"full_attention": {}}}, "one object for all layers"),
        ({"rms_norm_eps": -1}, "field rms_norm_eps must be a positive number"),
        ({"eos_token_id": "</s>"}, "field eos_token_id must be a token id or a list"),
        ({"model_type": "gemma", "hidden_act": "relu"}, "only gelu_pytorch_tanh is supported"),
        ({"model_type": "gemma2", "use_bidirectional_attention": True}, "both directions"),
        ({"model_type": "gemma2", "attn_logit_softcapping": -1}, "must be a positive number"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "set it to null"),
        ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1}}, "full_attention and"),
        ({"model_type": "gemma3", "text_config": {}}, "save that by itself, as gemma3_text"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "no_rope_layers must hold 0 or 1 for"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling must be a positive"),
        ({"model_type": "phi3", "rope_scaling": {"type": "su"}}, "short_factor must be a list"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.1}, "even number of rotated channels"),
        ({"rope_scaling": {"type": "longrope"}}, "field short_factor must be a list of numbers"),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1, 2], "long_factor": [1, "x"]}},
            "field long_factor[1] must be a positive number",
        ),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1] * 3, "long_factor": [1] * 4}},
            "needs as many factors in short_factor",
        ),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1] * 3, "long_factor": [1] * 3}},
            "longrope has factors for 6 channels, but 8 rotate",
        ),
        ({**SLIDING, "layer_types": ["full_attention"]}, "layer_types must name 3 layers"),
        ({**SLIDING, "layer_types": ["chunked_attention"] * 3}, "each full_attention or sliding"),
        ({**SLIDING, "use_sliding_window": False}, "but use_sliding_window is not true"),
        ({**SLIDING, "sliding_window": None}, "use_sliding_window is not true"),
        ({**SLIDING, "sliding_window": 0}, "field sliding_window must be a positive integer"),
        ({**SLIDING, "max_window_layers": -1}, "max_window_layers must be an integer of at least"),
        ({**MIXTRAL, "num_experts_per_tok": 9}, "a token cannot go through 9 of 8 experts"),
        ({**MIXTRAL, "num_local_experts": 0}, "num_local_experts must be a positive integer"),
        ({**MIXTRAL, "num_experts": 4}, "fields num_local_experts and num_experts differ"),
        ({**MIXTRAL, "num_local_experts": 10_923}, "has at most 32768 experts in all its layers"),
        ({**MIXTRAL, "intermediate_size": None}, "field intermediate_size is missing"),
        ({**QWEN, "mlp_only_layers": [3]}, "mlp_only_layers must be a list of layers from 0 to 2"),
        ({**QWEN, "mlp_only_layers": [True]}, "must be a list of layers from 0 to 2, not [True]"),
        ({**QWEN, "mlp_only_layers": 1}, "must be a list of layers from 0 to 2, not 1"),
        ({**QWEN, "mlp_only_layers": [0, 1, 2]}, "no layer has experts"),
        ({**QWEN, "decoder_sparse_step": 4}, "no layer has experts"),
        ({**QWEN, "decoder_sparse_step": 0}, "decoder_sparse_step must be a positive integer"),
        ({**QWEN, "norm_topk_prob": 1}, "field norm_topk_prob must be true or false"),
        ({**QWEN, "num_experts": 4}, "a token cannot go through 8 of 4 experts"),
    ],
)
def test_bad_configs_name_the_file_and_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        _spec(**changes)
    assert str(error.value).startswith("x/config.json: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_transformer_cannot_express() -> None:
    spec = _spec()
    mixed = (SoftmaxAttention(), SoftmaxAttention(8), SoftmaxAttention())
    changed = {
        "LayerNorm": replace(spec, norm=Norm("layer_norm")),
        "interleaved rope": replace(spec, rope=RotaryEmbedding(pairing="interleaved")),
        "embeddings": replace(spec, embedding_norm=True),
        "value heads": replace(spec, value_head_dim=4),
        "biases on q, k and v": replace(spec, attention_bias="qkv"),
        "different windows": replace(spec, layers=tuple(LayerSpec(m) for m in mixed)),
    }
    for message, model in changed.items():
        with pytest.raises(SpecError, match=message):
            families.spec_to_config(model)


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen3", "qwen3_moe", "olmo2", "gemma2", "gemma3_text"]
)
def test_what_a_family_always_has(family: str) -> None:
    """A model without it is not written as one that has it."""
    spec = replace(_spec(), provenance=Provenance(family=family))
    with pytest.raises(
        SpecError, match=f"cannot be written as {family}|differs from what {family}"
    ):
        families.spec_to_config(spec)


def test_a_mixture_that_a_family_cannot_state() -> None:
    spec = _spec(**MIXTRAL)
    assert spec.experts is not None
    wider = replace(spec, experts=replace(spec.experts, intermediate_size=65))
    for changed in (wider, replace(spec, experts=replace(spec.experts, normalise=False))):
        with pytest.raises(SpecError, match="differs from what mixtral can state"):
            families.spec_to_config(changed)
    with pytest.raises(SpecError, match="a mixture of experts cannot be written as a plain llama"):
        families.spec_to_config(replace(spec, provenance=Provenance(family="llama")))


def test_a_window_makes_it_mistral() -> None:
    spec = _spec().with_mixers([SoftmaxAttention(16)] * 3)
    assert families.spec_to_config(spec)["model_type"] == "mistral"
    scaled = replace(_spec(), rope=RotaryEmbedding(scaling=LinearScaling(2.0)))
    assert families.spec_to_config(scaled)["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("name", RELEASED)
def test_released_configs(name: str) -> None:
    """As transformers reads them, whatever it makes of defaults; and written, the same again."""
    transformers = pytest.importorskip("transformers")
    config = {**_SMALL, **RELEASED[name]}
    theirs = transformers.AutoConfig.for_model(**config).to_dict()
    spec = families.config_to_spec(config, "x")
    # Token ids that a config leaves out are transformers' defaults, which a tokenizer overrules.
    tokens = {n: theirs[n] for n in ("bos_token_id", "eos_token_id", "pad_token_id")}
    assert families.config_to_spec({**config, **tokens}, "x") == families.config_to_spec(
        theirs, "x"
    )
    written = families.spec_to_config(spec)
    assert written["model_type"] == config["model_type"]
    assert families.config_to_spec(written, "again") == spec
    again = transformers.AutoConfig.for_model(**written).to_dict()
    assert families.config_to_spec(again, "theirs") == spec


def _frequencies(config: dict[str, Any], length: int) -> tuple[Any, float]:
    """What transformers computes of a config for texts of a length."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    theirs = transformers.AutoConfig.for_model(**config)
    kind = theirs.rope_parameters["rope_type"]
    values, magnitude = ROPE_INIT_FUNCTIONS[kind](theirs, None, seq_len=length)
    return values.double().numpy(), magnitude


YARNS: dict[str, dict[str, Any]] = {
    "qwen": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "no original": {"factor": 4.0},
    "no factor": {"factor": None, "original_max_position_embeddings": 4096},
    "attention": {"factor": 8.0, "attention_factor": 1.7},
    "mscales": {"factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    "one mscale": {"factor": 40.0, "mscale": 0.7},
    "betas": {"factor": 3.0, "beta_fast": 64.0, "beta_slow": 4.0},
    "not truncated": {"factor": 3.0, "truncate": False},
    "short": {"factor": 3.0, "original_max_position_embeddings": 4},
    "as short as a turn": {"factor": 3.0, "original_max_position_embeddings": 6},
    "narrow": {"factor": 3.0, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "shrunk": {"factor": 0.5},
}


@pytest.mark.parametrize("name", YARNS)
def test_yarn_is_that_of_transformers(name: str) -> None:
    config = {
        **LLAMA, "head_dim": 128, "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "yarn", **YARNS[name]},
    }  # fmt: skip
    rope = families.config_to_spec(config, "x").rope
    expected, magnitude = _frequencies(config, 10)
    np.testing.assert_allclose(inverse_frequencies(rope, 128), expected, rtol=1e-6)
    assert rope.magnitude == pytest.approx(magnitude, rel=1e-12)
    written = families.spec_to_config(families.config_to_spec(config, "x"))
    assert families.config_to_spec(written, "again").rope == rope
    again, magnitude = _frequencies(written, 10)
    np.testing.assert_array_equal(again, expected)
    assert rope.magnitude == pytest.approx(magnitude, rel=1e-12)


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
@pytest.mark.parametrize("beside", [True, False])
def test_longrope_is_that_of_transformers(kind: str, beside: bool) -> None:
    short, long = ([base + 0.1 * i * i for i in range(6)] for base in (1.0, 2.0))
    config: dict[str, Any] = {
        **LLAMA, "model_type": "phi3", "hidden_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "partial_rotary_factor": 0.75,
        "max_position_embeddings": 131072, "rope_theta": 10000.0,
        "rope_scaling": {"type": kind, "short_factor": short, "long_factor": long},
    }  # fmt: skip
    if beside:
        config["original_max_position_embeddings"] = 8192
    spec = families.config_to_spec(config, "x")
    scaling = spec.rope.scaling
    assert isinstance(scaling, LongropeScaling)
    assert scaling.original_max_position_embeddings == (8192 if beside else 4096)
    written = families.spec_to_config(spec)
    assert families.config_to_spec(written, "again") == spec
    # Of the earliest name transformers 5 makes nothing any more.
    config["rope_scaling"]["type"] = kind if kind != "su" else "longrope"
    for chosen, length in (("short", 4000), ("long", 8193)):
        rope = replace(spec.rope, scaling=replace(scaling, factors=chosen))
        for stated in (config, written):
            expected, magnitude = _frequencies(stated, length)
            np.testing.assert_allclose(inverse_frequencies(rope, 16), expected, rtol=1e-6)
            assert rope.magnitude == pytest.approx(magnitude, rel=1e-12)


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_transformers_understands_what_is_written(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    spec = _spec(model_type=model_type, rope_scaling=LLAMA3, sliding_window=None)
    config = families.spec_to_config(spec)
    theirs = transformers.AutoConfig.for_model(**config)
    assert families.config_to_spec(theirs.to_dict(), "theirs") == spec
