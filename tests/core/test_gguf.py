"""GGUF: the real model against transformers' own loading, and written files of every kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from supra_core import families
from supra_core.artifact import folder as artifact
from supra_core.errors import SupraError
from supra_core.formats.gguf import reader as gguf
from supra_core.formats.safetensors import write_file
from supra_core.mixers.positions import LinearScaling, Llama3Scaling, RotaryEmbedding
from supra_core.mixers.rotary import inverse_frequencies
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.layout import tensor_shapes
from supra_core.sources.source import WRITERS, open_source
from tests.tables import thinned

library = pytest.importorskip("gguf")

HEADS, KEY_VALUE_HEADS, HIDDEN, FFN, VOCABULARY = 8, 4, 256, 512, 262


def _permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's reordering of q and k (convert_hf_to_gguf.py, LlamaModel.permute)."""
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def _arrays(tied: bool = True, bias: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (VOCABULARY, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_v.weight": (HIDDEN // 2, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (FFN, HIDDEN),
        "blk.0.ffn_up.weight": (FFN, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FFN),
    }
    if not tied:
        shapes["output.weight"] = (VOCABULARY, HIDDEN)
    if bias:
        shapes |= {
            "blk.0.attn_q.bias": (HIDDEN,),
            "blk.0.attn_k.bias": (HIDDEN // 2,),
            "blk.0.attn_v.bias": (HIDDEN // 2,),
            "blk.0.attn_output.bias": (HIDDEN,),
        }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _write(
    path: Path,
    arrays: dict[str, np.ndarray] | None = None,
    change: Callable[[Any], None] = lambda writer: None,
    architecture: str = "llama",
    kinds: dict[str, Any] | None = None,
) -> Path:
    writer = library.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_VALUE_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    change(writer)
    for name, array in (arrays or _arrays()).items():
        writer.add_tensor(name, array, raw_dtype=(kinds or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# --- the real model -------------------------------------------------------------------------


@pytest.mark.model
def test_real_model_spec(smollm2_gguf: Path) -> None:
    found = open_source(smollm2_gguf)
    spec = found.spec
    assert (found.kind, found.dtype, spec.num_hidden_layers) == ("gguf", "float32", 30)
    assert (spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim) == (9, 3, 64)
    assert (spec.rope, spec.norm.eps) == (RotaryEmbedding(100000.0), 1e-5)
    assert (spec.tie_word_embeddings, spec.eos_token_id, spec.bos_token_id) == (True, (2,), 1)


@pytest.fixture(scope="session")
def smollm2_artifact(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = open_source(smollm2_gguf)
    out = tmp_path_factory.mktemp("smollm2") / "model"
    artifact.write(out, source.spec, source.tensors, source.assets(), dtype="float32")
    return out


@pytest.mark.model
@pytest.mark.slow
def test_real_weights_are_transformers_own(smollm2_gguf: Path, smollm2_artifact: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    loading = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    place = {"pretrained_model_name_or_path": str(smollm2_gguf.parent)}
    config = transformers.AutoConfig.from_pretrained(**place, gguf_file=smollm2_gguf.name)
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    # What from_pretrained(gguf_file=...) calls, without the accelerate it asks for.
    loaded = loading.load_gguf_checkpoint(
        str(smollm2_gguf), return_tensors=True, model_to_load=empty
    )
    theirs = loaded["tensors"]
    ours = artifact.read(smollm2_artifact).tensors
    assert ours.keys() == theirs.keys() - {"lm_head.weight"}
    assert len(ours) == 272
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs[name].numpy(), err_msg=name)


TEXTS = (
    "The capital of France is Paris.",
    "  indented\n\tcode = {'a': 1}  # comment\n\n\n",
    "Ünïcödé 漢字 🙂 12345 3.14 don't we'll",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>",
    "",
)
CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ],
)


@pytest.mark.model
@pytest.mark.parametrize("to", thinned(["supra", "hf"], ["supra"]))
def test_real_tokenizer_is_transformers_own(
    smollm2_gguf: Path, smollm2_artifact: Path, tmp_path: Path, to: str
) -> None:
    transformers = pytest.importorskip("transformers")
    out = smollm2_artifact
    if to == "hf":
        source = open_source(smollm2_artifact)
        out = tmp_path / "hf"
        WRITERS[to](out, source.spec, source.tensors, source.assets(), dtype="bfloat16")
    ours = transformers.AutoTokenizer.from_pretrained(out)
    theirs = transformers.AutoTokenizer.from_pretrained(
        str(smollm2_gguf.parent), gguf_file=smollm2_gguf.name
    )
    assert len(ours) == len(theirs) == 49152
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "all_special_ids"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.eos_token == "<|im_end|>"
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        assert ours.decode(ids) == theirs.decode(ids) == text
        # transformers leaves out what the file states of the digits: tokenizer.ggml.pre smollm.
        if not any(c.isdigit() for c in text):
            assert ids == theirs(text)["input_ids"]
    # A digit is a token by itself, and what is before it ends there.
    for text, tokens in {
        "\n\n1. 2024": ["\u010a\u010a", "1", ".", "\u0120", "2", "0", "2", "4"],
        "x 15 tons": ["x", "\u0120", "1", "5", "\u0120tons"],
    }.items():
        assert ours.convert_ids_to_tokens(ours(text)["input_ids"]) == tokens
    for chat in CHATS:
        for prompt in (True, False):
            rendered = [
                tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
                for tokenizer in (ours, theirs)
            ]
            assert rendered[0] == rendered[1]
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


# --- written files --------------------------------------------------------------------------


@pytest.mark.parametrize(("tied", "bias"), [(True, False), (False, True)])
def test_names_and_row_order(tmp_path: Path, tied: bool, bias: bool) -> None:
    arrays = _arrays(tied, bias)
    stored = {
        name: _permuted(array, HEADS if "attn_q" in name else KEY_VALUE_HEADS)
        if "attn_q" in name or "attn_k" in name
        else array
        for name, array in arrays.items()
    }
    model = gguf.read(_write(tmp_path / "m.gguf", stored))
    assert model.spec.tie_word_embeddings is tied
    assert model.spec.attention_bias == ("qkvo" if bias else "none")
    assert model.tensors.keys() == tensor_shapes(model.spec).keys()
    for ours, theirs in {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    }.items():
        np.testing.assert_array_equal(model.tensors[ours].read(), arrays[theirs])
    if bias:
        found = model.tensors["model.layers.0.self_attn.k_proj.bias"].read()
        np.testing.assert_array_equal(found, arrays["blk.0.attn_k.bias"])


def test_biases_of_the_feed_forward_network(tmp_path: Path) -> None:
    biases = {
        f"blk.0.ffn_{name}.bias": np.full(size, value, np.float32)
        for name, size, value in (("gate", FFN, 1.0), ("up", FFN, 2.0), ("down", HIDDEN, 3.0))
    }
    model = gguf.read(_write(tmp_path / "m.gguf", {**_arrays(), **biases}))
    assert model.spec.mlp_bias
    found = model.tensors["model.layers.0.mlp.down_proj.bias"].read()
    np.testing.assert_array_equal(found, biases["blk.0.ffn_down.bias"])


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_types_are_kept(tmp_path: Path, kind: str) -> None:
    dtype = np.dtype({"F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind])
    name = "blk.0.attn_v.weight"
    arrays = _arrays()
    expected = arrays[name].astype(dtype)
    arrays[name] = expected if kind == "F16" else expected.view(np.uint8)
    kinds = {name: library.GGMLQuantizationType[kind]}
    model = gguf.read(_write(tmp_path / "m.gguf", arrays, kinds=kinds))
    tensor = model.tensors["model.layers.0.self_attn.v_proj.weight"]
    assert tensor.dtype == dtype
    np.testing.assert_array_equal(tensor.read(), expected)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K"])
def test_blocks_are_dequantised(tmp_path: Path, kind: str) -> None:
    torch = pytest.importorskip("torch")
    dequant = pytest.importorskip("transformers.integrations.gguf.dequant")
    quantisation = library.GGMLQuantizationType[kind]
    block, size = library.GGML_QUANT_SIZES[quantisation]
    blocks = np.random.default_rng(1).integers(0, 255, (FFN, HIDDEN // block * size), np.uint8)
    # Random scales may be NaN or infinite: clear the top of every byte of an exponent.
    blocks &= 0x3F
    name = "blk.0.ffn_up.weight"
    arrays = {**_arrays(), name: blocks}
    model = gguf.read(_write(tmp_path / "m.gguf", arrays, kinds={name: quantisation}))
    tensor = model.tensors["model.layers.0.mlp.up_proj.weight"]
    found = tensor.read()
    assert (found.shape, found.dtype, tensor.dtype) == ((FFN, HIDDEN), np.float32, np.float32)
    # An implementation of the same formats in torch.
    theirs = dequant.dequantize(torch.from_numpy(blocks), int(quantisation)).numpy()
    np.testing.assert_allclose(found, theirs.reshape(found.shape), rtol=1e-6, atol=1e-6)
    assert np.ptp(found) > 0


def test_mistral_and_linear_scaling(tmp_path: Path) -> None:
    def change(writer: Any) -> None:
        writer.add_sliding_window(32)
        writer.add_rope_scaling_type(library.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)
        writer.add_rope_freq_base(1e6)

    spec = gguf.read(_write(tmp_path / "m.gguf", change=change)).spec
    assert spec.layers[0].mixer == SoftmaxAttention(32)
    assert spec.rope == RotaryEmbedding(1e6, scaling=LinearScaling(2.0))
    assert spec.norm.eps == 1e-6


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_qwen(tmp_path: Path, architecture: str) -> None:
    """As transformers reads the same file."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    loading = pytest.importorskip("transformers.modeling_gguf_pytorch_utils")
    arrays, size = _arrays(tied=False), HIDDEN // HEADS
    if architecture == "qwen2":
        arrays |= {n: a for n, a in _arrays(bias=True).items() if "output" not in n}
    else:
        arrays |= {f"blk.0.attn_{n}_norm.weight": np.full(size, 2.0, np.float32) for n in "qk"}

    def change(writer: Any) -> None:
        writer.add_rope_freq_base(1e6)
        if architecture == "qwen3":
            writer.add_key_length(size)

    path = _write(tmp_path / "m.gguf", arrays, change, architecture)
    spec = gguf.read(path).spec
    assert (spec.provenance.family, spec.rope.base) == (architecture, 1e6)
    assert spec.attention_bias == ("qkv" if architecture == "qwen2" else "none")
    assert spec.query_key_norm == ("per_head" if architecture == "qwen3" else "none")
    config = transformers.AutoConfig.from_pretrained(tmp_path, gguf_file="m.gguf")
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(config)
    theirs = loading.load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=empty)
    ours = families.family_of(spec).from_canonical(spec, gguf.read(path).tensors)
    assert ours.keys() == theirs["tensors"].keys()
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs["tensors"][name].numpy(), err_msg=name)
    with pytest.raises(SupraError, match="does not say which layers have a window"):
        gguf.read(
            _write(tmp_path / "s.gguf", arrays, lambda w: w.add_sliding_window(8), architecture)
        )


def test_llama3_scaling_is_recovered(tmp_path: Path) -> None:
    scaling = Llama3Scaling(32.0, 1.0, 4.0, 8192)
    rope = RotaryEmbedding(500000.0, scaling=scaling)
    plain = inverse_frequencies(RotaryEmbedding(500000.0), HIDDEN // HEADS)
    factors = (plain / inverse_frequencies(rope, HIDDEN // HEADS)).astype(np.float32)
    assert 1 < np.median(factors) <= 32

    def read(divisors: np.ndarray) -> RotaryEmbedding:
        arrays = {**_arrays(), "rope_freqs.weight": divisors}
        path = _write(tmp_path / "m.gguf", arrays, lambda w: w.add_rope_freq_base(5e5))
        return gguf.read(path).spec.rope

    assert read(factors) == rope
    assert read(np.ones_like(factors)) == RotaryEmbedding(500000.0)
    with pytest.raises(SupraError, match=r"rope_freqs\.weight is not Llama 3.s rope scaling"):
        read(np.linspace(1, 9, len(factors), dtype=np.float32))


def test_sentencepiece_tokenizer_with_bos(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    special = ["<unk>", "<s>", "</s>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "\u2581a"]
    kinds = [2, 3, 3, *[6] * 256, 1, 1, 1]

    def change(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * 259 + [-1.0, -2.0, -0.5])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_eot_token_id(5)
        writer.add_unk_token_id(0)
        writer.add_chat_template("{{ bos_token }}{{ messages[0]['content'] }}")

    path = _write(tmp_path / "m.gguf", change=change)
    source = open_source(path)
    assert source.spec.eos_token_id == (2, 5)
    artifact.write(
        tmp_path / "out", source.spec, source.tensors, source.assets(), dtype=source.dtype
    )
    ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    # As llama.cpp does: a space before every stretch of text, whatever it begins with.
    for text, ids in {
        "a a": [1, 261, 261],
        "aa b": [1, 261, 260, 259, 3 + ord("b")],
        " <s>a": [1, 259, 259, 1, 261],
        "": [1],
        "\u00e9": [1, 259, 3 + 0xC3, 3 + 0xA9],
    }.items():
        assert ours(text)["input_ids"] == ids, text
    assert ours.decode([261, 261]) == "a a"
    chat = [{"role": "user", "content": "a"}]
    assert ours.apply_chat_template(chat, tokenize=False) == "<s>a"


# --- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 2000, -1000])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = _write(tmp_path / "cut.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SupraError) as error:
        open_source(path)
    assert "cut.gguf: truncated or damaged GGUF file" in str(error.value)
    assert "\n" not in str(error.value)


def test_garbage_and_other_files(tmp_path: Path) -> None:
    path = tmp_path / "no.gguf"
    path.write_bytes(np.random.default_rng(0).bytes(5000))
    with pytest.raises(SupraError, match="truncated or damaged GGUF"):
        open_source(path)
    write_file(path, {})
    with pytest.raises(SupraError, match="truncated or damaged GGUF"):
        open_source(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_expert_count(8), "mixture of experts"),
        (lambda w: w.add_causal_attention(False), "llama.attention.causal is False"),
        (lambda w: w.add_logit_scale(0.5), "llama.logit_scale is 0.5"),
        (lambda w: w.add_uint16("split.count", 2), "one of 2 parts of a split model"),
        (lambda w: w.add_vocab_size(5), "llama.vocab_size is 5, but token_embd.weight has 262"),
        (
            lambda w: w.add_token_list(["a"] * 263),
            "263 entries, but token_embd.weight has 262 rows",
        ),
        (lambda w: w.add_rope_dimension_count(16), "rope.dimension_count is 16, which differs"),
        (lambda w: w.add_value_length(64), "attention.value_length is 64, which differs"),
        (
            lambda w: w.add_rope_scaling_type(library.RopeScalingType.YARN),
            "'yarn' is not supported",
        ),
    ],
)
def test_what_is_not_supported(tmp_path: Path, change: Callable[[Any], None], message: str) -> None:
    with pytest.raises(SupraError) as error:
        open_source(_write(tmp_path / "m.gguf", change=change))
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "m.gguf"))


def test_another_architecture_missing_and_unknown_tensors(tmp_path: Path) -> None:
    with pytest.raises(SupraError, match=r"general\.architecture is 'gemma2', but .* llama, qwen2"):
        open_source(_write(tmp_path / "m.gguf", architecture="gemma2"))
    arrays = _arrays()
    arrays["blk.0.attn_gate.weight"] = arrays.pop("blk.0.ffn_up.weight")
    with pytest.raises(SupraError) as error:
        open_source(_write(tmp_path / "m.gguf", arrays))
    assert "missing model.layers.0.mlp.up_proj.weight" in str(error.value)
    assert "unexpected blk.0.attn_gate.weight" in str(error.value)
    name = "blk.0.ffn_up.weight"
    kind = library.GGMLQuantizationType.Q8_1
    block, size = library.GGML_QUANT_SIZES[kind]
    arrays = {**_arrays(), name: np.zeros((FFN, HIDDEN // block * size), np.uint8)}
    with pytest.raises(SupraError, match=r"ffn_up\.weight has type Q8_1, which the gguf package"):
        open_source(_write(tmp_path / "m.gguf", arrays, kinds={name: kind}))


# --- names, parts and types -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["M.GGUF", "sha256-0f3a", "model.bin"])
def test_a_file_is_known_by_its_beginning(tmp_path: Path, name: str) -> None:
    assert open_source(_write(tmp_path / name)).kind == "gguf"


def test_a_folder_with_a_file_in_capitals(tmp_path: Path) -> None:
    _write(tmp_path / "M.GGUF")
    assert open_source(tmp_path).kind == "gguf"


def _write_parts(folder: Path, count: int = 3) -> list[Path]:
    """A model as gguf-split leaves it: the first part has the metadata, each some tensors."""
    arrays = _arrays()
    names = sorted(arrays)

    def change(writer: Any, number: int) -> None:
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(arrays))

    paths = []
    for number in range(count):
        path = folder / f"m-{number + 1:05}-of-{count:05}.gguf"
        held = {name: arrays[name] for name in names[number::count]}
        if number == 0:
            _write(path, held, lambda writer: change(writer, 0))
        else:
            writer = library.GGUFWriter(path, "llama")
            change(writer, number)
            for name, array in held.items():
                writer.add_tensor(name, array)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        paths.append(path)
    return paths


def test_a_model_in_parts(tmp_path: Path) -> None:
    whole = gguf.read(_write(tmp_path / "whole.gguf")).tensors
    folder = tmp_path / "parts"
    folder.mkdir()
    first, second, third = _write_parts(folder)
    for named in (first, folder):
        found = open_source(named).tensors
        assert found.keys() == whole.keys()
        for name, tensor in found.items():
            np.testing.assert_array_equal(tensor.read(), whole[name].read(), err_msg=name)
    with pytest.raises(SupraError, match=r"00002-of.* part of a split model: name its first part"):
        open_source(second)
    third.rename(folder / "third")
    for named in (first, folder):
        with pytest.raises(SupraError, match=r"m-00003-of-00003\.gguf is missing, part 3 of 3"):
            open_source(named)
    (folder / "third").rename(third)
    first.rename(folder / "first")
    for named in (third, folder):
        with pytest.raises(SupraError, match=r"m-00001-of-00003\.gguf is missing, part 1 of 3"):
            open_source(named)
    third.write_bytes(second.read_bytes())
    (folder / "first").rename(first)
    with pytest.raises(SupraError, match="is not part 3 of 3"):
        open_source(first)
    second.unlink()
    first.rename(folder / "m.gguf")
    with pytest.raises(SupraError, match="name its first part NAME-00001-of-00003"):
        open_source(folder / "m.gguf")


DEQUANTISED = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
    "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0",
    "TQ2_0", "MXFP4",
)  # fmt: skip


@pytest.mark.parametrize("kind", DEQUANTISED)
def test_every_type_that_the_package_dequantises(tmp_path: Path, kind: str) -> None:
    quantisation = library.GGMLQuantizationType[kind]
    block, size = library.GGML_QUANT_SIZES[quantisation]
    blocks = np.random.default_rng(1).integers(0, 64, (FFN, HIDDEN // block * size), np.uint8)
    name = "blk.0.ffn_up.weight"
    path = _write(tmp_path / "m.gguf", {**_arrays(), name: blocks}, kinds={name: quantisation})
    found = gguf.read(path).tensors["model.layers.0.mlp.up_proj.weight"].read()
    assert found.shape == (FFN, HIDDEN)
    np.testing.assert_array_equal(found, library.dequantize(blocks, quantisation))
