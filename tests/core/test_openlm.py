"""The published layout: read from every form it comes in, written back to the last bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supra_core.errors import FormatError, SpecError
from supra_core.formats import safetensors
from supra_core.formats.openlm import checkpoint as openlm
from supra_core.formats.openlm.config import config_to_spec, is_config, spec_to_config
from supra_core.formats.openlm.tensors import published_tensors
from supra_core.mixers.linear import LinearAttention
from supra_core.mixers.parts import (
    FeatureMap,
    GroupNorm,
    LightningDecay,
    NoDecay,
    Projection,
    RetnetDecay,
)
from supra_core.mixers.positions import LinearScaling, Llama3Scaling, RotaryEmbedding
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.layout import tensor_shapes
from supra_core.model.spec import Experts, ModelSpec
from supra_core.tensors import LazyTensor
from tests.tiny_models import with_experts

CONFIG: dict[str, Any] = {
    "hidden_dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_heads_kv": 2,
    "intermediate_dim_ffn": 48,
    "seq_len": 64,
    "vocab_size": 40,
    "post_embed_norm": False,
    "weight_tying": False,
    "qk_norm": False,
    "model_norm": "rms_norm",
    "positional_embedding_type": "rotary",
    "ffn_type": "swiglu",
    "attn_name": "linear_attn",
    "use_decay": True,
    "use_retnet_slopes": False,
    "decay_start": None,
}


def _spec(**changes: Any) -> ModelSpec:
    return config_to_spec({**CONFIG, **changes}, "x/config.json")


def _mixer(**changes: Any) -> LinearAttention:
    mixer = _spec(**changes).layers[0].mixer
    assert isinstance(mixer, LinearAttention)
    return mixer


def _random(spec: ModelSpec, seed: int = 0) -> dict[str, LazyTensor]:
    rng = np.random.default_rng(seed)
    return {
        name: LazyTensor.of(rng.normal(size=shape).astype(np.float32))
        for name, shape in tensor_shapes(spec).items()
    }


def _same(a: dict[str, LazyTensor], b: dict[str, LazyTensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].read().tobytes() == b[name].read().tobytes() for name in a
    )


@pytest.mark.parametrize("folder", ["a_mha_decay", "b_gqa_decay"])
def test_oracles_round_trip(oracles: Path, tmp_path: Path, folder: str) -> None:
    source = oracles / folder
    spec, tensors = openlm.read(source)
    from_pickle = openlm.read(source / "checkpoint.pt")
    assert from_pickle[0] == spec
    assert _same(from_pickle[1], tensors)
    assert list(tensors) == list(tensor_shapes(spec))
    openlm.write(tmp_path / "out", spec, tensors, {"tokenizer.json": b"{}"}, dtype="float32")
    written = safetensors.read_folder(tmp_path / "out")
    assert _same(written, safetensors.read_folder(source))
    again, _ = openlm.read(tmp_path / "out")
    assert again == spec
    stated = json.loads((source / "config.json").read_text())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stated.items() <= config.items()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"


def test_config_beside_is_found_by_its_shapes(oracles: Path) -> None:
    folder = oracles / "g_convert_mistral"
    spec, tensors = openlm.read(folder / "linear_checkpoint.pt")
    assert isinstance(spec.layers[0].mixer, LinearAttention)
    explicit = openlm.read(
        folder / "linear_model.safetensors", folder / "openlm_linear_config.json"
    )
    assert explicit[0] == spec
    assert _same(explicit[1], tensors)
    with pytest.raises(FormatError, match=r"unexpected layers\.0\.attention\._totrain_embed"):
        openlm.read(folder / "linear_checkpoint.pt", folder / "openlm_softmax_config.json")


def test_hub_names_mean_the_same() -> None:
    aliases = {"hidden_dim": "dim", "model_norm": "norm_type", "qk_norm": "apply_qk_norm"}
    hub = {aliases.get(name, name): value for name, value in CONFIG.items()}
    hub |= {"model_type": "openlm", "architectures": ["OpenLMForCausalLM"], "norm_eps": 1e-5}
    assert is_config(hub)
    assert config_to_spec(hub, "x") == _spec()


def test_what_the_fields_mean() -> None:
    mixer = _mixer()
    assert mixer.feature_map == FeatureMap("relu", 8, Projection("all_heads", shared=False))
    assert _mixer(n_heads_kv=None).feature_map.projection == Projection("all_heads", shared=True)
    assert (mixer.rope_position, mixer.key_scale, mixer.qk_norm) == ("after", 8**-0.5, False)
    assert mixer.normaliser == GroupNorm(1e-5)
    assert mixer.decay == LightningDecay()
    assert _mixer(decay_start=2).decay == LightningDecay(2.0)
    assert _mixer(use_retnet_slopes=True).decay == RetnetDecay()
    assert _mixer(use_decay=False, use_retnet_slopes=True).decay == NoDecay()
    assert _mixer(positional_embedding_type="none", qk_head_dim=6).rope_position == "none"
    assert _spec(positional_embedding_type="llama_rotary").rope.pairing == "interleaved"
    assert _spec(rotary_base_frequency=1000000, rotary_scale=2.0).rope == RotaryEmbedding(
        1e6, scaling=LinearScaling(2.0)
    )
    assert _spec(model_norm="gain_only_lp_layer_norm").norm.kind == "layer_norm"
    assert _spec(intermediate_dim_ffn=None, hidden_dim=2048).intermediate_size == 5632
    softmax = _spec(attn_name="torch_attn", v_head_dim=4)
    assert softmax.is_transformer
    assert (softmax.head_dim, softmax.value_head_dim) == (8, 4)


def test_mistral_stops_at_the_ids_its_uptraining_used() -> None:
    assert _spec().eos_token_id == ()
    assert _spec(vocab_size=32000).eos_token_id == (2, 0)
    assert _spec(vocab_size=32000, eos_token_id=7).eos_token_id == (7,)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_tying": True, "n_heads_kv": None, "model_norm": "gain_only_lp_layer_norm"},
        {"qk_norm": True, "post_embed_norm": True, "v_head_dim": 6},
        {"use_retnet_slopes": True, "positional_embedding_type": "llama_rotary"},
        {"use_decay": False, "positional_embedding_type": "none", "qk_head_dim": 6},
        {"attn_name": "torch_attn", "rotary_base_frequency": 1000000, "rotary_scale": 4.0},
        {"decay_start": 0.5, "eos_token_id": [3, 4], "bos_token_id": 1, "pad_token_id": 0},
    ],
)
def test_round_trip_of_every_choice(tmp_path: Path, changes: dict[str, Any]) -> None:
    spec = _spec(**changes)
    tensors = _random(spec)
    openlm.write(tmp_path / "out", spec, tensors, {}, dtype="float32")
    again, found = openlm.read(tmp_path / "out")
    assert again == spec
    assert _same(found, tensors)
    stored = safetensors.read_folder(tmp_path / "out")
    assert "output.weight" in stored


def test_rows_of_the_packed_matrices() -> None:
    spec = _spec(v_head_dim=6)
    tensors = _random(spec)
    stored = published_tensors(spec, tensors)
    packed = stored["layers.1.attention.in_proj.weight"].read()
    assert packed.shape == (4 * 8 + 2 * 8 + 2 * 6, 32)
    prefix = "model.layers.1.self_attn."
    np.testing.assert_array_equal(packed[:32], tensors[prefix + "q_proj.weight"].read())
    np.testing.assert_array_equal(packed[48:], tensors[prefix + "v_proj.weight"].read())
    gated = stored["layers.1.feed_forward.w12.weight"].read()
    np.testing.assert_array_equal(gated[:48], tensors["model.layers.1.mlp.gate_proj.weight"].read())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_wrappers_prefixes_and_rotary_tables(tmp_path: Path, prefix: str) -> None:
    spec = _spec()
    stored = {
        prefix + name: tensor for name, tensor in published_tensors(spec, _random(spec)).items()
    }
    stored[prefix + "layers.0.attention.pos_embed.inv_freq"] = LazyTensor.of(np.ones(4, np.float32))
    safetensors.write_file(tmp_path / "model.safetensors", stored)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert _same(openlm.read(tmp_path)[1], _random(spec))


def test_ties(tmp_path: Path) -> None:
    spec = _spec(weight_tying=True)
    stored = published_tensors(spec, _random(spec))
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "weight_tying": True}))
    once = {name: tensor for name, tensor in stored.items() if name != "tok_embeddings.weight"}
    safetensors.write_file(tmp_path / "model.safetensors", once)
    assert _same(openlm.read(tmp_path)[1], _random(spec))
    stored["output.weight"] = LazyTensor.of(np.zeros((40, 32), np.float32))
    safetensors.write_file(tmp_path / "model.safetensors", stored)
    with pytest.raises(FormatError, match="tok_embeddings and output differ"):
        openlm.read(tmp_path)[1]["model.embed_tokens.weight"].read()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ffn_type": "gemma_geglu"}, "field ffn_type is 'gemma_geglu'"),
        ({"moe_freq": 2}, "mixture of experts"),
        ({"model_norm": "lp_layer_norm"}, "the norm 'lp_layer_norm' is not supported"),
        ({"model_norm": None}, "the norm 'default_layer_norm' is not supported"),
        ({"attn_name": "custom_attn"}, "field attn_name is 'custom_attn'"),
        ({"attn_name": "torch_attn", "qk_norm": True}, "softmax attention with a q/k norm"),
        ({"positional_embedding_type": "head_rotary"}, "is 'head_rotary', which is not supported"),
        ({"n_layers": None}, "field n_layers is missing"),
        ({"hidden_dim": None}, "field dim or hidden_dim is missing"),
        ({"n_heads": 5}, "is not a multiple of n_heads"),
        ({"n_heads_kv": 3}, "must be a multiple of num_key_value_heads"),
        ({"use_decay": "yes"}, "field use_decay must be true or false"),
    ],
)
def test_configs_that_cannot_be_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as error:
        _spec(**changes)
    assert str(error.value).startswith("x/config.json: ")
    assert message in str(error.value)


def test_what_the_layout_cannot_express() -> None:
    spec, mixer = _spec(), _mixer()
    phi = mixer.feature_map
    others = {
        "layers that differ": [mixer, SoftmaxAttention()],
        "a sliding window": [SoftmaxAttention(4)] * 2,
        "another feature map": [replace(mixer, feature_map=replace(phi, activation="signed_relu"))]
        * 2,
        "rope between": [replace(mixer, rope_position="between")] * 2,
        "another output norm": [replace(mixer, normaliser=GroupNorm(1e-6))] * 2,
        "another key scale": [replace(mixer, key_scale=1.0)] * 2,
        "a gain": [replace(mixer, gain="per_head")] * 2,
    }
    models = {message: spec.with_mixers(list(mixers)) for message, mixers in others.items()}
    llama3 = RotaryEmbedding(scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
    models["Llama 3 rope scaling"] = replace(spec, rope=llama3)
    models["attention biases"] = replace(spec, attention_bias="qkv")
    models["heads that do not divide"] = replace(spec, head_dim=16)
    models["capped logits"] = replace(spec, logits_softcap=5.0)
    models["a mixture of experts"] = with_experts(spec, Experts(3, 2, 16))
    models["a norm of queries and keys"] = replace(spec, query_key_norm="per_head")
    for message, model in models.items():
        with pytest.raises(SpecError, match=f"the OpenLM layout cannot express {message}"):
            spec_to_config(model)


def test_shape_and_name_errors(tmp_path: Path) -> None:
    spec = _spec()
    stored = published_tensors(spec, _random(spec))
    stored["norm.weight"] = LazyTensor.of(np.ones(5, np.float32))
    del stored["output.weight"]
    safetensors.write_file(tmp_path / "model.safetensors", stored)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FormatError) as error:
        openlm.read(tmp_path)
    assert "missing output.weight; norm.weight has shape [5], expected [32]" in str(error.value)
