"""docs/formats.md says enough: a reader that was written from it computes the same logits."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import re
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from supra_core import families
from supra_core.artifact import folder as artifact
from supra_core.artifact.config import spec_to_config
from supra_core.conversion.linearize import LinearizeOptions, linearize
from supra_core.errors import SpecError
from supra_core.formats.assets import ASSET_NAMES
from supra_core.formats.mlx_quantized import read_packed, unpacked
from supra_core.mixers.linear import LinearAttention
from supra_core.mixers.parts import (
    FeatureMap,
    Folded,
    GroupNorm,
    Identity,
    LearnedDecay,
    LightningDecay,
    NoDecay,
    Projection,
    RetnetDecay,
    SumNormaliser,
)
from supra_core.mixers.softmax import SoftmaxAttention
from supra_core.model.layout import tensor_shapes
from supra_core.model.reference import ReferenceModel
from supra_core.model.spec import LayerSpec, ModelSpec
from supra_core.runtime.state_file import Owner, SavedState, write_state
from supra_core.tensors import LazyTensor
from tests.core.independent_reader import Model
from tests.tiny_families import FAMILIES
from tests.tiny_models import SPECS, lazy_weights

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "formats.md").read_text()
READER = ROOT / "tests" / "core" / "independent_reader.py"
TOKENS = 23


def compare(spec: ModelSpec, folder: Path, dtype: str = "float32") -> None:
    artifact.write(folder, spec, lazy_weights(spec), {}, dtype=dtype)
    ids = np.random.default_rng(1).integers(0, spec.vocab_size, TOKENS)
    expected = ReferenceModel(spec, artifact.read(folder).tensors).logits(ids[None])[0]
    found = Model(folder).logits(ids.tolist())
    scale = np.abs(expected).max()
    assert scale > 0.1
    assert np.abs(found - expected).max() <= 1e-9 * scale


@pytest.mark.parametrize("name", SPECS)
def test_every_tiny_model(name: str, tmp_path: Path) -> None:
    compare(SPECS[name], tmp_path / "model")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str, tmp_path: Path) -> None:
    """As it is, and with layers of linear attention in the place of the first and the second."""
    family = FAMILIES[name]
    spec = families.config_to_spec({"model_type": family.model_type, **family.config}, name)
    compare(spec, tmp_path / "transformer")
    linear, _ = linearize(spec, lazy_weights(spec), LinearizeOptions(keep_softmax=(2,)))
    compare(linear, tmp_path / "linear")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_types(dtype: str, tmp_path: Path) -> None:
    compare(SPECS["hybrid"], tmp_path / "model", dtype)


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from supra_core.formats import safetensors

    monkeypatch.setattr(safetensors.write_folder, "__defaults__", (None, None, 4000))
    compare(SPECS["windowed"], tmp_path / "model")
    assert (tmp_path / "model" / safetensors.INDEX).exists()


def _mixers() -> list[LinearAttention]:
    """Every combination of a mixer's choices that can be built, for equally many heads."""
    size = 10
    maps = [
        FeatureMap(activation, size, projection)
        for activation in ("relu", "signed_relu", "signed_softmax", "none")
        for projection in (
            Projection("all_heads"), Projection("per_head", bias=False),
            Projection("per_head", shared=True), Folded(), Folded(bias=False), Identity(),
        )
    ]  # fmt: skip
    decays = (NoDecay(), LightningDecay(), LightningDecay(0.4), RetnetDecay(), LearnedDecay())
    normalisers = (GroupNorm(1e-4), SumNormaliser(), SumNormaliser(sink=True))
    found = []
    choices = itertools.product(
        maps, ("none", "before", "between", "after"), decays, normalisers, (False, True),
        ("none", "per_head", "per_channel"), (None, 1, 6),
    )  # fmt: skip
    for phi, rope, decay, normaliser, qk_norm, gain, window in choices:
        try:
            found.append(
                LinearAttention(
                    phi,
                    rope,
                    decay,
                    normaliser,
                    0.7,
                    qk_norm,
                    gain,
                    window,  # type: ignore[arg-type]
                )
            )
        except SpecError:
            continue
    return found


def test_a_sample_of_all_combinations(tmp_path: Path) -> None:
    mixers = _mixers()
    order = np.random.default_rng(0).permutation(len(mixers))
    base = replace(SPECS["transformer"], num_key_value_heads=6, attention_bias="none")
    seen: set[str] = set()
    for number in range(60):
        chosen = [mixers[index] for index in order[number * 3 : number * 3 + 3]]
        layers = (*(LayerSpec(mixer) for mixer in chosen), LayerSpec(SoftmaxAttention(4)))
        bias = ("none", "qkv", "qkvo")[number % 3]
        compare(
            replace(base, layers=layers, attention_bias=bias),  # type: ignore[arg-type]
            tmp_path / str(number),
        )
        seen |= {str(value) for mixer in chosen for value in _choices(mixer)}
    wanted = {str(value) for mixer in mixers for value in _choices(mixer)}
    assert seen == wanted


def _choices(mixer: LinearAttention) -> tuple[object, ...]:
    return (
        mixer.feature_map, mixer.rope_position, mixer.decay, mixer.normaliser,
        mixer.qk_norm, mixer.gain, f"window {mixer.window}",
    )  # fmt: skip


def test_a_change_of_any_tensor_is_seen(tmp_path: Path) -> None:
    """So that the comparison would notice a tensor that the reader leaves out."""
    spec = SPECS["paper_variant"]
    artifact.write(tmp_path / "m", spec, lazy_weights(spec), {}, dtype="float32")
    model = Model(tmp_path / "m")
    ids = list(range(8))
    before = model.logits(ids)
    for name in tensor_shapes(spec):
        changed = Model(tmp_path / "m")
        changed.tensors[name] = changed.tensors[name] * 1.5 + 0.1
        assert np.abs(changed.logits(ids) - before).max() > 1e-6, name


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantised_matrices(bits: int) -> None:
    """One stream of bits a row, lowest first, as the page says it; read bit by bit here."""
    rng, rows, groups, group = np.random.default_rng(bits), 3, 2, 32
    words = rng.integers(0, 2**32, (rows, groups * group * bits // 32), dtype=np.uint32)
    arrays = {
        "m.weight": words,
        "m.scales": rng.normal(size=(rows, groups)).astype(np.float32),
        "m.biases": rng.normal(size=(rows, groups)).astype(np.float32),
    }
    packed = read_packed(
        {name: LazyTensor.of(array) for name, array in arrays.items()},
        {"bits": bits, "group_size": group, "mode": "affine"}, "config.json",
    )  # fmt: skip
    expected = np.empty((rows, groups * group))
    for row, column in np.ndindex(*expected.shape):
        number = 0
        for bit in range(bits):
            word, shift = divmod(column * bits + bit, 32)
            number |= (int(words[row, word]) >> shift & 1) << bit
        scale, bias = (arrays[f"m.{part}"][row, column // group] for part in ("scales", "biases"))
        expected[row, column] = scale * number + bias
    found = unpacked(packed)["m.weight"].read()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("began", [None, datetime(2024, 7, 26, 23, 59)])
def test_saved_states(tmp_path: Path, began: datetime | None) -> None:
    state = SavedState(
        Owner("m", "é", "mlx", "float32"), ({"role": "user", "content": "ä"},), (1, 2),
        {"layers.0.state": np.ones((1, 2), np.float32), "layers.10.keys": np.zeros(3, np.float32)},
        began,
    )  # fmt: skip
    write_state(tmp_path / "s", state)
    content = (tmp_path / "s").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    stated = header.pop("__metadata__")
    names = ["backend", "dtype", "messages", "model", "source"]
    if began is not None:
        names.insert(1, "began")
        assert stated["began"] == "2024-07-26T23:59:00"
    text = json.dumps({name: stated[name] for name in names}, ensure_ascii=False)
    digest = hashlib.sha256(text.encode())
    for name in sorted(header):
        shape, dtype = tuple(header[name]["shape"]), {"I64": "int64", "F32": "float32"}
        digest.update(f"{name} {shape} {dtype[header[name]['dtype']]}\n".encode())
        digest.update(data[slice(*header[name]["data_offsets"])])
    assert stated["sha256"] == digest.hexdigest()
    assert stated["format"] == ("supra-state-1" if began is None else "supra-state-2")
    assert stated["format"] in PAGE and stated.keys() == {"format", "sha256", *names}
    assert header.keys() == {"tokens", "state.layers.0.state", "state.layers.10.keys"}


def test_the_reader_is_independent() -> None:
    tree = ast.parse(READER.read_text())
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    } | {
        (node.module or "").split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    }
    assert imported - set(sys.stdlib_module_names) == {"numpy"}


def test_the_page_names_every_field_and_tensor() -> None:
    named = set(re.findall(r"`\"?([\w.]+)\"?`", PAGE)) | set(re.findall(r"\"(\w+)\"", PAGE))
    for spec in SPECS.values():
        config = spec_to_config(spec, "float32")
        for word in _words(json.loads(json.dumps(config))) - {""}:
            assert word in named, word
        for tensor in tensor_shapes(spec):
            parts = re.sub(r"experts\.\d+", "experts.M", tensor).split(".")
            assert tensor in named or any(".".join(parts[at:]) in PAGE for at in range(3, 6)), (
                tensor
            )
    assert named.issuperset(ASSET_NAMES)
    assert "docs/artifact.md" not in (ROOT / "README.md").read_text()


def _words(value: object) -> set[str]:
    """The keys and the strings of a config."""
    if isinstance(value, dict):
        return set(value) | {word for entry in value.values() for word in _words(entry)}
    if isinstance(value, list):
        return {word for entry in value for word in _words(entry)}
    return {value} if isinstance(value, str) else set()
