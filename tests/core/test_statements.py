"""Statements that contradict each other: as transformers takes them, or refused naming both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supra_core import families
from supra_core.conversion.convert import ConversionRequest, convert
from supra_core.errors import SupraError
from supra_core.formats import safetensors
from supra_core.sources.source import open_source
from supra_core.tensors import LazyTensor
from tests.tiny_families import FAMILIES

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FULL, SLIDING = "full_attention", "sliding_attention"


def _config(name: str, **changes: Any) -> dict[str, Any]:
    tiny = FAMILIES[name]
    stated = {"model_type": tiny.model_type, **tiny.config}
    return {k: v for k, v in {**stated, **changes}.items() if v is not ...}


# --- configs --------------------------------------------------------------------------------

# What counts where fields of one config differ, to be held against transformers' own config.
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "rope_scaling over rope_parameters": (
        "mistral", {"rope_parameters": PLAIN, "rope_scaling": YARN},
    ),
    "an empty rope_scaling": ("mistral", {"rope_parameters": YARN, "rope_scaling": {}}),
    "rope_scaling without a base, one beside it": (
        "mistral", {"rope_scaling": YARN, "rope_parameters": ..., "rope_theta": 5e5},
    ),
    "the inner base": (
        "mistral", {"rope_parameters": {**PLAIN, "rope_theta": 1e6}, "rope_theta": 5e5},
    ),
    "rope_type over type": (
        "mistral", {"rope_scaling": {**YARN, "type": "linear"}, "rope_parameters": ...},
    ),
    "factor over the lengths": (
        "mistral", {"rope_scaling": {**YARN, "factor": 3.0}, "max_position_embeddings": 1024},
    ),
    "the length beside the rope, of Phi-3": (
        "phi3-longrope",
        {
            "rope_parameters": {
                **FAMILIES["phi3-longrope"].settings["rope_parameters"],
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "the inner fraction, of Phi-3": (
        "phi3-partial",
        {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.8}, "partial_rotary_factor": 0.4},
    ),
    "rope_scaling of Gemma 3 over its full layers": (
        "gemma3",
        {
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 5e5},
                SLIDING: {"rope_type": "default", "rope_theta": 20.0},
            },
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_theta": 7.0, "rope_local_base_freq": 9.0,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ROPES)
def test_the_rope_that_counts(case: str) -> None:
    """By writing the parameters that transformers ends up with, and those alone."""
    transformers = pytest.importorskip("transformers")
    name, changes = ROPES[case]
    config = _config(name, **changes)
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    alone = {**config, "rope_parameters": theirs.rope_parameters}
    for other in ("rope_scaling", "rope_theta", "rope_local_base_freq", "partial_rotary_factor"):
        alone.pop(other, None)
    ours, expected = (families.config_to_spec(stated, "x") for stated in (config, alone))
    assert (ours.rope, ours.local_rope) == (expected.rope, expected.local_rope)


@pytest.mark.parametrize(
    ("name", "changes", "fields"),
    [
        (
            "mistral",
            {"rope_parameters": {**PLAIN, "rope_theta": 1e6}, "rope_scaling": YARN},
            ("rope_parameters", "rope_scaling", "rope_theta is 1000000.0 in the first and 10000"),
        ),
        (
            "mistral",
            {"rope_scaling": YARN, "original_max_position_embeddings": 64},
            ("original_max_position_embeddings is 64, but rope_scaling", "128"),
        ),
        ("mistral", {"layer_types": [FULL] * 3}, ("layer_types does not agree", "'mistral'")),
        ("llama-linear", {"layer_types": [SLIDING] * 3}, ("layer_types does not agree",)),
        ("olmo2", {"layer_types": [FULL] * 2}, ("layer_types must name 3 layers",)),
        ("qwen2", {"layer_types": [SLIDING] * 3}, ("layer_types", "use_sliding_window")),
        ("smollm3", {"layer_types": [SLIDING] * 3}, ("layer_types", "use_sliding_window")),
        ("smollm3", {"no_rope_layers": [1]}, ("no_rope_layers must hold", "3 layers")),
        ("qwen3_moe", {"num_local_experts": 8}, ("num_local_experts and num_experts differ",)),
        ("qwen2", {"quantization_config": {"bits": 4}}, ("quantization_config",)),
        ("gemma3", {"attn_logit_softcapping": 3.0}, ("attn_logit_softcapping",)),
    ],
)
def test_configs_that_are_refused(name: str, changes: dict[str, Any], fields: tuple[str]) -> None:
    with pytest.raises(SupraError) as error:
        families.config_to_spec(_config(name, **changes), "c.json")
    assert str(error.value).startswith("c.json: ")
    for field in fields:
        assert field in str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_types_that_agree(name: str) -> None:
    """transformers writes them for some families, and other programs for any."""
    spec = families.config_to_spec(_config(name), "x")
    windows = [layer.mixer.window for layer in spec.layers]  # type: ignore[union-attr]
    stated = [FULL if window is None else SLIDING for window in windows]
    assert families.config_to_spec(_config(name, layer_types=stated), "x") == spec


# --- tied embeddings ------------------------------------------------------------------------


def _folder(name: str, folder: Path, tied: bool) -> dict[str, Any]:
    """A tiny model, and its tensors under the names in the file."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = _config(name, tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config)
    )
    model.save_pretrained(folder)
    return {n: t.read().copy() for n, t in safetensors.read_folder(folder).items()}


def _store(folder: Path, arrays: dict[str, Any]) -> None:
    stored = {name: LazyTensor.of(array) for name, array in arrays.items()}
    safetensors.write_file(folder / safetensors.SINGLE, stored)


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("name", ["mistral", "qwen2", "phi3-partial", "gemma2", "granite"])
def test_tied_embeddings_beside_an_output_matrix(name: str, tmp_path: Path) -> None:
    arrays = _folder(name, tmp_path, tied=True)
    transformers = pytest.importorskip("transformers")
    embedding = arrays[EMBEDDING]
    for head, tied in ((embedding, True), (embedding + 1, False)):
        _store(tmp_path, {**arrays, HEAD: head})
        found = open_source(tmp_path)
        assert found.spec.tie_word_embeddings is tied
        assert (HEAD in found.tensors) is not tied
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
        output = theirs.get_output_embeddings().weight.detach().numpy()
        ours = found.tensors[EMBEDDING if tied else HEAD].read()
        np.testing.assert_array_equal(ours, output)
        if tied:
            assert found.notes == ()
        else:
            (note,) = found.notes
            assert "tie_word_embeddings is true" in note
            assert HEAD in note
    # Stored once, under the other name.
    _store(tmp_path, {HEAD: embedding, **{n: a for n, a in arrays.items() if n != EMBEDDING}})
    found = open_source(tmp_path)
    assert found.spec.tie_word_embeddings
    np.testing.assert_array_equal(found.tensors[EMBEDDING].read(), embedding)


def test_no_output_matrix_where_one_is_stated(tmp_path: Path) -> None:
    arrays = _folder("mistral", tmp_path, tied=False)
    _store(tmp_path, {name: array for name, array in arrays.items() if name != HEAD})
    with pytest.raises(SupraError, match=r"tie_word_embeddings is false, .* no lm_head\.weight"):
        open_source(tmp_path)


# --- files ----------------------------------------------------------------------------------


def test_one_file_beside_an_index(tmp_path: Path) -> None:
    """As transformers, which reads the index where there is no single file."""
    one, other = (tmp_path / name for name in ("one", "other"))
    arrays = _folder("mistral", one, tied=False)
    shutil.copytree(one, other)
    _store(other, {name: array + 1 for name, array in arrays.items()})
    shard = "model-00001-of-00001.safetensors"
    shutil.copyfile(other / safetensors.SINGLE, one / shard)
    (one / safetensors.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(arrays, shard)}))
    found = open_source(one).tensors[EMBEDDING].read()
    np.testing.assert_array_equal(found, arrays[EMBEDDING])
    (one / safetensors.SINGLE).unlink()
    found = open_source(one).tensors[EMBEDDING].read()
    np.testing.assert_array_equal(found, arrays[EMBEDDING] + 1)


def test_a_file_that_is_not_what_the_folder_is_read_from(tmp_path: Path) -> None:
    _folder("mistral", tmp_path, tied=False)
    other = tmp_path / "other.safetensors"
    shutil.copyfile(tmp_path / safetensors.SINGLE, other)
    assert open_source(tmp_path / safetensors.SINGLE).kind == "hf"
    with pytest.raises(
        SupraError, match=r"read from model\.safetensors, not from .*other\.safetensors"
    ):
        open_source(other)


POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0a" * 32 + "\nsize 123456\n"
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "config.json",
        "m.gguf", "tokenizer.json", "generation_config.json",
    ],
)  # fmt: skip
def test_git_lfs_pointers_are_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name in ("tokenizer.json", "generation_config.json"):
        _folder("mistral", tmp_path, tied=False)
    elif path.suffix != ".gguf":
        (tmp_path / "config.json").write_text(json.dumps(_config("mistral")))
    path.write_text(POINTER)
    with pytest.raises(SupraError) as error:
        open_source(path if path.suffix == ".gguf" else tmp_path).assets()
    assert str(error.value).startswith(f"{path} is a Git LFS pointer")
    assert "git lfs pull" in str(error.value)


def test_a_tokenizer_with_more_ids_than_the_embeddings(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    _folder("mistral", tmp_path / "m", tied=False)
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{index}": index for index in range(50)}, unk_token="w0")
    )
    for added, notes in (([], 0), (["<pad>", "<tool>"], 1)):
        tokenizer.add_special_tokens(added)
        tokenizer.save(str(tmp_path / "m" / "tokenizer.json"))
        done = convert(ConversionRequest(tmp_path / "m", tmp_path / f"out{notes}", linearize=False))
        assert len(done.notes) == notes
    assert "'<pad>' (50), '<tool>' (51)" in done.notes[0]
    assert "embeddings for 50 tokens" in done.notes[0]
    (tmp_path / "m" / "tokenizer.json").write_text("{}")
    (note,) = convert(ConversionRequest(tmp_path / "m", tmp_path / "broken", linearize=False)).notes
    assert "tokenizer.json cannot be used" in note
