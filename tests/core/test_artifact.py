"""The artifact folder: exact round trip, atomic, and no contradiction goes unseen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from supra_core.artifact import folder as artifact
from supra_core.artifact.config import config_to_spec, spec_to_config
from supra_core.errors import FormatError, LayoutError, SpecError, SupraError
from supra_core.formats import safetensors
from supra_core.mixers.linear import LinearAttention
from supra_core.mixers.parts import FeatureMap, Identity, LearnedDecay, Norm, SumNormaliser
from supra_core.mixers.positions import Llama3Scaling, RotaryEmbedding
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.layout import tensor_shapes
from supra_core.model.spec import LayerSpec, ModelSpec, Provenance
from supra_core.tensors import LazyTensor
from tests.tiny_models import SPECS, lazy_weights

LINEAR = LinearAttention(
    feature_map=FeatureMap("signed_softmax", 8, Identity()),
    rope_position="before",
    decay=LearnedDecay(),
    normaliser=SumNormaliser(),
    gain="per_head",
    window=4,
)


def _spec(**changes: Any) -> ModelSpec:
    spec = ModelSpec(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        value_head_dim=8,
        layers=tuple(LayerSpec(mixer) for mixer in (LINEAR, SoftmaxAttention(3), LINEAR)),
        norm=Norm("layer_norm", 1e-6),
        rope=RotaryEmbedding(5e5, "half", Llama3Scaling(8.0, 1.0, 4.0, 64)),
        bos_token_id=1,
        eos_token_id=(2, 0),
        provenance=Provenance("org/name", "llama", "windowed", 12345),
    )
    return replace(spec, **changes)


def _tensors(spec: ModelSpec) -> dict[str, LazyTensor]:
    rng = np.random.default_rng(0)
    return {
        name: LazyTensor.of(rng.normal(size=shape).astype(np.float32))
        for name, shape in tensor_shapes(spec).items()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    spec = _spec()
    artifact.write(tmp_path / "m", spec, _tensors(spec), {"tokenizer.json": b"t"}, dtype="float32")
    return tmp_path / "m"


def _change(folder: Path, **changes: Any) -> None:
    path = folder / artifact.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("eos", [(), (2,), (2, 0)])
def test_config_round_trip(eos: tuple[int, ...]) -> None:
    spec = _spec(eos_token_id=eos)
    config = json.loads(json.dumps(spec_to_config(spec, "bfloat16")))
    assert config_to_spec(config, "x") == spec
    assert config["layer_types"] == ["linear_attention", "sliding_attention", "linear_attention"]
    assert (len(config["mixers"]), config["layer_mixers"]) == (2, [0, 1, 0])
    assert config["architectures"] == ["SupraForCausalLM"]


def test_later_fields_stand_only_where_they_say_something() -> None:
    """Older readers know version 1, which has none of them."""
    config = spec_to_config(_spec(), "float32")
    assert (config["format_version"], config["hidden_act"]) == (1, "silu")
    assert set(config) == {
        "architectures", "model_type", "format_version", "torch_dtype", "vocab_size",
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
        "head_dim", "value_head_dim", "norm", "rope", "tie_word_embeddings", "embedding_norm",
        "attention_bias", "max_position_embeddings", "bos_token_id", "eos_token_id",
        "pad_token_id", "provenance", "hidden_act", "num_hidden_layers", "layer_types", "mixers",
        "layer_mixers",
    }  # fmt: skip
    assert set(config["norm"]) == {"kind", "eps"}
    assert set(config["rope"]) == {"base", "pairing", "scaling"}
    assert set(config["mixers"][1]) == {"kind", "window"}
    assert "rotary" not in config["mixers"][0]
    assert "replaced_mixers" not in config["provenance"]
    changes: tuple[dict[str, Any], ...] = (
        {"norm": Norm(weight_offset=1.0)}, {"query_key_norm": "all_heads"},
        {"block_norm": "both"}, {"hidden_act": "gelu_pytorch_tanh"}, {"embedding_scale": 3.0},
        {"residual_scale": 0.3}, {"attention_scale": 0.2}, {"attention_softcap": 5.0},
        {"logits_divisor": 3.0}, {"logits_softcap": 5.0}, {"local_rope": RotaryEmbedding(1e3)},
        {"rope": RotaryEmbedding(fraction=0.5)},
        {"provenance": Provenance(replaced_mixers=(SoftmaxAttention(8, "none"),) * 3)},
    )  # fmt: skip
    for change in changes:
        spec = _spec(**change)
        config = json.loads(json.dumps(spec_to_config(spec, "float32")))
        assert config["format_version"] == 2
        assert config_to_spec(config, "x") == spec


def test_folder_round_trip(folder: Path) -> None:
    read = artifact.read(folder)
    assert (read.spec, read.dtype, read.path) == (_spec(), "float32", folder)
    expected = _tensors(_spec())
    assert read.tensors.keys() == expected.keys()
    for name, tensor in read.tensors.items():
        np.testing.assert_array_equal(tensor.read(), expected[name].read())
    assert (folder / "tokenizer.json").read_bytes() == b"t"
    card = (folder / "README.md").read_text()
    assert all(word in card for word in ("org/name", "windowed", "12,345", "2 linear_attention"))


def test_bfloat16_keeps_small_tensors_in_float32(tmp_path: Path) -> None:
    spec = _spec()
    artifact.write(tmp_path / "m", spec, _tensors(spec), {}, dtype="bfloat16")
    read = artifact.read(tmp_path / "m")
    kept = {name for name, tensor in read.tensors.items() if tensor.dtype == np.float32}
    assert {name.split(".", 3)[3] for name in kept} == {
        "self_attn.log_slope",
        "self_attn.log_far_gain",
    }
    expected = _tensors(spec)["model.norm.weight"].read().astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(read.tensors["model.norm.weight"].read(), expected)


def test_numbers_beyond_float16_are_refused(tmp_path: Path) -> None:
    spec = _spec()
    tensors = _tensors(spec)
    tensors["model.norm.weight"] = LazyTensor.of(np.full(16, 1e6, np.float32))
    with pytest.raises(SupraError, match=r"model\.norm\.weight holds numbers beyond float16"):
        artifact.write(tmp_path / "m", spec, tensors, {}, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    spec = _spec()

    def stop(done: int, total: int) -> None:
        assert 0 < done <= total
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifact.write(tmp_path / "m", spec, _tensors(spec), {}, dtype="float32", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_and_rewriting_in_place(folder: Path) -> None:
    read = artifact.read(folder)
    with pytest.raises(SupraError, match="exists already"):
        artifact.write(folder, read.spec, read.tensors, {}, dtype="float16")
    artifact.write(folder, read.spec, read.tensors, {}, dtype="float16", force=True)
    assert artifact.read(folder).dtype == "float16"
    assert not (folder / "tokenizer.json").exists()


@pytest.mark.parametrize("name", ["../evil", "config.json", "model.safetensors"])
def test_assets_cannot_replace_the_model(tmp_path: Path, name: str) -> None:
    spec = _spec()
    with pytest.raises(FormatError, match="not a new file name"):
        artifact.write(tmp_path / "m", spec, _tensors(spec), {name: b""}, dtype="float32")
    assert list(tmp_path.iterdir()) == []


EXPERTS = {"count": 3, "per_token": 2, "intermediate_size": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "field model_type must be 'supra'"),
        ({"format_version": 6}, "field format_version is 6, but this supra reads up to 5"),
        ({"format_version": None}, "field format_version is missing"),
        ({"num_hidden_layers": 4}, "field num_hidden_layers contradicts layer_mixers"),
        ({"layer_types": ["full_attention"] * 3}, "field layer_types contradicts layer_mixers"),
        ({"layer_feed_forwards": ["dense"]}, "must be a list with one entry for each of 3 layers"),
        ({"layer_feed_forwards": {"0": "dense"}}, "layer_feed_forwards must be a list"),
        ({"layer_feed_forwards": ["dense", "dense", "sparse"]}, "layers.2.feed_forward: input"),
        ({"layer_feed_forwards": ["experts"] * 3}, "layers with experts and the field experts"),
        ({"experts": EXPERTS}, "layers with experts and the field experts need each other"),
        ({"experts": {**EXPERTS, "per_token": 4}}, "a token cannot go through 4 of 3 experts"),
        ({"experts": {**EXPERTS, "count": 0}}, "experts.count must be positive"),
        ({"experts": {**EXPERTS, "capacity": 1}}, "field experts.capacity"),
        ({"layer_mixers": [0, 2, 0]}, "field layer_mixers holds 2, which is not an index"),
        ({"layer_mixers": []}, "field layer_mixers must be a list"),
        ({"mixers": None}, "field mixers must be a list"),
        ({"hidden_act": "gelu"}, "field hidden_act must be silu"),
        ({"vocab_size": "x"}, "field vocab_size"),
        ({"torch_dtype": "int8"}, "field torch_dtype is 'int8'"),
    ],
)
def test_configs_that_contradict_themselves(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    _change(folder, **changes)
    with pytest.raises(SpecError) as error:
        artifact.read(folder)
    assert str(error.value).startswith(str(folder / "config.json"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_field_is_named(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["head_dim"]
    path.write_text(json.dumps(config))
    with pytest.raises(SpecError, match="field head_dim"):
        artifact.read(folder)


def test_weights_that_do_not_fit_the_config(folder: Path) -> None:
    _change(folder, torch_dtype="bfloat16")
    with pytest.raises(FormatError, match=r"is float32, but config\.json states bfloat16"):
        artifact.read(folder)
    _change(folder, torch_dtype="float32", vocab_size=21)
    with pytest.raises(LayoutError, match=r"embed_tokens\.weight has shape \[20, 16\]"):
        artifact.read(folder)
    _change(folder, vocab_size=20, tie_word_embeddings=True)
    with pytest.raises(LayoutError, match=r"unexpected lm_head\.weight"):
        artifact.read(folder)


def test_fields_of_other_programs_are_ignored(folder: Path) -> None:
    _change(folder, transformers_version="5.0", auto_map={"AutoConfig": "a.B"}, use_cache=True)
    assert artifact.read(folder).spec == _spec()


def test_writing_needs_the_spec_s_tensors(tmp_path: Path) -> None:
    spec = _spec()
    tensors = _tensors(spec)
    del tensors["model.norm.weight"]
    with pytest.raises(LayoutError, match=r"missing model\.norm\.weight"):
        artifact.write(tmp_path / "m", spec, tensors, {}, dtype="float32")
    assert safetensors.SHARD_BYTES == 5_000_000_000


def _kept(spec: ModelSpec) -> dict[str, Any]:
    """The transformer's tensors of a calibrated model."""
    shapes = tensor_shapes(spec)
    names = artifact.replaced_by_calibrating(spec)
    return {name: np.ones(shapes[name], np.float32) for name in names}


def test_the_transformers_tensors_are_all_that_calibrating_replaced(tmp_path: Path) -> None:
    spec = SPECS["hybrid"]
    whole = _kept(spec)
    assert list(whole) == [f"model.layers.{n}.self_attn.o_proj.weight" for n in (0, 2)]
    originals = {name: LazyTensor.of(array) for name, array in whole.items()}
    out = tmp_path / "out"
    artifact.write(out, spec, lazy_weights(spec), {}, dtype="float32", originals=originals)
    assert artifact.read(out).originals.keys() == whole.keys()
    name = next(iter(whole))
    changed: dict[str, dict[str, Any]] = {
        "is missing": {k: v for k, v in whole.items() if k != name},
        "is not one that calibration replaces": {**whole, "model.norm.weight": np.ones(24)},
        "is int8": {**whole, name: whole[name].astype(np.int8)},
        "is float64": {**whole, name: whole[name].astype(np.float64)},
        "is float32 .*, not float32": {**whole, name: whole[name][:-1]},
    }
    for said, arrays in changed.items():
        tensors = {n: LazyTensor.of(array) for n, array in arrays.items()}
        safetensors.write_file(out / artifact.ORIGINAL, tensors)
        message = rf"original\.safetensors: .*{said}.*: get the file again, or delete it"
        with pytest.raises(FormatError, match=message):
            artifact.read(out)
    (out / artifact.ORIGINAL).unlink()
    assert artifact.read(out).originals == {}
