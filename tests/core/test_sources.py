"""open_source: every format by one call, and one clear sentence for what is wrong."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supra_core.artifact import folder as artifact
from supra_core.errors import SupraError
from supra_core.formats import safetensors
from supra_core.sources.source import WRITERS, Source, open_source
from supra_core.tensors import LazyTensor


@pytest.fixture
def mistral(oracles: Path, tmp_path: Path) -> Path:
    """A copy of the oracle's tiny Mistral that a test may damage."""
    folder = tmp_path / "mistral"
    folder.mkdir()
    for file in (oracles / "g_convert_mistral" / "hf_mistral").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _change_tensors(
    folder: Path, change: Callable[[dict[str, LazyTensor]], dict[str, LazyTensor]]
) -> None:
    arrays = {name: t.read().copy() for name, t in safetensors.read_folder(folder).items()}
    tensors = change({name: LazyTensor.of(array) for name, array in arrays.items()})
    safetensors.write_file(folder / safetensors.SINGLE, tensors)


def _same(a: Source, b: Source) -> bool:
    return a.tensors.keys() == b.tensors.keys() and all(
        a.tensors[name].read().tobytes() == b.tensors[name].read().tobytes() for name in a.tensors
    )


def _write(source: Source, out: Path, to: str) -> Source:
    WRITERS[to](out, source.spec, source.tensors, source.assets(), dtype=source.dtype)
    return open_source(out)


def test_kinds(oracles: Path, mistral: Path) -> None:
    found = open_source(mistral)
    assert (found.kind, found.dtype, found.path) == ("hf", "float32", mistral)
    assert found.spec.provenance.source == "mistral"
    assert found.assets().keys() == {"generation_config.json"}
    assert open_source(mistral / "model.safetensors").kind == "hf"
    assert open_source(oracles / "a_mha_decay").kind == "openlm"
    assert open_source(oracles / "g_convert_mistral" / "linear_checkpoint.pt").kind == "openlm"


@pytest.mark.parametrize("to", ["supra", "hf", "openlm"])
def test_a_transformer_through_every_format(mistral: Path, tmp_path: Path, to: str) -> None:
    source = open_source(mistral)
    again = _write(source, tmp_path / to, to)
    assert again.kind == to
    assert _same(again, source)
    assert again.assets() == source.assets()
    # The OpenLM layout does not say which family a model was; the rest is the same model.
    back = open_source(_write(again, tmp_path / "back", "hf").path)
    assert back.spec.layers == source.spec.layers
    assert _same(back, source)


def test_hf_output_keeps_the_stored_bytes(mistral: Path, tmp_path: Path) -> None:
    _write(open_source(mistral), tmp_path / "out", "hf")
    before, after = (safetensors.read_folder(place) for place in (mistral, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(before[name].read().tobytes() == after[name].read().tobytes() for name in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]


def test_linear_attention_is_no_plain_transformer(oracles: Path, tmp_path: Path) -> None:
    with pytest.raises(SupraError, match="linear-attention layers cannot be written as a plain"):
        _write(open_source(oracles / "a_mha_decay"), tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights(mistral: Path, zipped: bool) -> None:
    torch = pytest.importorskip("torch")
    source = open_source(mistral)
    arrays = {name: torch.from_numpy(t.read().copy()) for name, t in source.tensors.items()}
    (mistral / "model.safetensors").unlink()
    place = mistral / "pytorch_model.bin"
    torch.save(arrays, place, _use_new_zipfile_serialization=zipped)
    found = open_source(mistral)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found.tensors[name].read(), array.numpy())


def test_common_extra_tensors_are_dropped(mistral: Path) -> None:
    _change_config(mistral, tie_word_embeddings=True)
    table = LazyTensor.of(np.ones(16, np.float32))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    embedding = "model.embed_tokens.weight"
    _change_tensors(
        mistral, lambda tensors: {**tensors, name: table, "lm_head.weight": tensors[embedding]}
    )
    found = open_source(mistral)
    assert name not in found.tensors
    assert "lm_head.weight" not in found.tensors


def test_a_run_gives_its_model_or_newest_checkpoint(mistral: Path, tmp_path: Path) -> None:
    source, run = open_source(mistral), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(SupraError, match="run without a model or checkpoint yet"):
        open_source(run)
    for step, dtype in (("9", "float32"), ("10", "float16")):
        place = run / "checkpoints" / f"step_{step}" / "model"
        artifact.write(place, source.spec, source.tensors, {}, dtype=dtype)
    (run / "checkpoints" / "step_11").mkdir()  # Not written to its end.
    found = open_source(run)
    assert (found.kind, found.dtype, found.path) == ("run", "float16", run)
    # Inside a stage of adapters the model by itself is not what was trained.
    (run / "checkpoints" / "step_10" / "adapters.safetensors").touch()
    with pytest.raises(SupraError, match="trains adapters, .* to finish it"):
        open_source(run)
    artifact.write(run / "model", source.spec, source.tensors, {}, dtype="bfloat16")
    assert open_source(run).dtype == "bfloat16"


def test_a_folder_has_no_revisions(mistral: Path) -> None:
    with pytest.raises(SupraError, match="mistral is not a hub id and has no revisions"):
        open_source(mistral, revision="main")


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def _poison(folder: Path) -> None:
    class Call:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(folder / "ran"),)

    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": Call()}))


def _without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        _change_tensors(folder, lambda t: {key: t[key] for key in t if key != name})

    return damage


def _misshapen(folder: Path) -> None:
    wrong = LazyTensor.of(np.ones((3, 5), np.float32))
    _change_tensors(folder, lambda t: {**t, "model.layers.1.mlp.up_proj.weight": wrong})


def _unexpected(folder: Path) -> None:
    _change_tensors(folder, lambda t: {**t, "surplus": LazyTensor.of(np.ones(1, np.float32))})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "mistral does not exist: check the path"),
        (lambda f: _change_config(f, model_type="mamba"), "field model_type is 'mamba', which is"),
        (lambda f: (f / "config.json").unlink(), "mistral holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "mistral holds no weights"),
        (_truncate, "model.safetensors: truncated or damaged"),
        (_misshapen, "mlp.up_proj.weight has shape [3, 5], expected [160, 128]"),
        (_without("model.layers.1.self_attn.k_proj.weight"), "missing model.layers.1.self_attn.k"),
        (_without("lm_head.weight"), "the weights hold no lm_head.weight"),
        (_unexpected, "unexpected surplus"),
        (_poison, "pytorch_model.bin: refused, because its pickle would run code"),
    ],
)
def test_one_clear_sentence(mistral: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(mistral)
    with pytest.raises(SupraError) as error:
        open_source(mistral)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (mistral / "ran").exists()


def test_files_and_folders_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        SupraError, match=r"notes\.txt is not a model file: name a folder, or one of \.gguf"
    ):
        open_source(tmp_path / "notes.txt")
    with pytest.raises(SupraError, match="does not exist"):
        open_source(tmp_path / "nothing.gguf")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(SupraError, match="several GGUF files"):
        open_source(tmp_path)


def test_neither_torch_nor_transformers_is_imported(oracles: Path) -> None:
    code = (
        "import sys\nfrom supra_core.sources.source import open_source\n"
        f"open_source({str(oracles / 'a_mha_decay')!r})\n"
        f"open_source({str(oracles / 'a_mha_decay' / 'checkpoint.pt')!r})\n"
        "print([m for m in ('torch', 'mlx', 'transformers', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
