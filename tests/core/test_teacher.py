"""Which transformer a model is set against when none is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from supra_core.artifact import folder as artifact
from supra_core.conversion.linearize import LinearizeOptions, linearize
from supra_core.formats import huggingface
from supra_core.sources import teacher
from supra_core.sources.source import open_source
from supra_core.sources.teacher import find_teacher, holds_original, original
from supra_core.tensors import LazyTensor


@pytest.fixture
def converted(tiny_transformer: Path, tmp_path: Path) -> Path:
    """A conversion beside its transformer."""
    source = open_source(tiny_transformer)
    (tmp_path / source.path.name).symlink_to(source.path)
    spec, tensors = linearize(source.spec, source.tensors, LinearizeOptions("pure"))
    artifact.write(tmp_path / "linear", spec, tensors, source.assets(), dtype="float32")
    return tmp_path / "linear"


def test_the_stated_source_beside_the_model(converted: Path, tiny_transformer: Path) -> None:
    assert find_teacher(converted) == str(converted.parent / tiny_transformer.name)
    assert find_teacher(tiny_transformer) is None
    (converted.parent / tiny_transformer.name).unlink()
    assert find_teacher(converted) is None


def test_a_run_names_its_teacher(converted: Path, tiny_transformer: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for named, expected in (
        (str(tiny_transformer), str(tiny_transformer)),
        (str(converted), str(converted.parent / tiny_transformer.name)),
        (str(tmp_path / "gone"), None),
    ):
        (run / "run.json").write_text(json.dumps({"teacher": named}))
        assert find_teacher(run) == expected


def test_the_run_of_the_folder_that_one_is_in(
    converted: Path, tiny_transformer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    converted.rename(run / "model")
    (run / "run.json").write_text(json.dumps({"teacher": str(tiny_transformer)}))
    monkeypatch.chdir(run / "model")
    for model in (".", Path()):
        assert find_teacher(model) == str(tiny_transformer)
    (run / "run.json").unlink()
    assert find_teacher(".") is None
    (run / tiny_transformer.name).symlink_to(tiny_transformer)
    assert find_teacher(".") == str(run / tiny_transformer.name)


def test_another_model_of_the_same_name_is_no_teacher(
    converted: Path, tiny_transformer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    beside, here = converted.parent / tiny_transformer.name, elsewhere / tiny_transformer.name
    here.symlink_to(tiny_transformer)
    assert find_teacher(converted) == str(beside)
    beside.unlink()
    assert find_teacher(converted) == tiny_transformer.name
    here.unlink()
    source = open_source(tiny_transformer)
    spec = replace(source.spec, vocab_size=source.spec.vocab_size + 1)
    embedding = LazyTensor.of(np.zeros((spec.vocab_size, spec.hidden_size), np.float32))
    huggingface.write(
        beside, spec, {**source.tensors, "model.embed_tokens.weight": embedding}, {},
        dtype="float32",
    )  # fmt: skip
    assert open_source(beside).spec.is_transformer
    assert find_teacher(converted) is None


def test_a_cached_hub_id(
    tiny_transformer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"teacher": "org/model"}))
    pytest.importorskip("huggingface_hub")
    assert find_teacher(run) is None
    monkeypatch.setattr(teacher, "is_cached", lambda hub_id: hub_id == "org/model")
    monkeypatch.setattr(teacher, "open_source", lambda place: open_source(tiny_transformer))
    assert find_teacher(run) == "org/model"


def test_the_transformer_inside_a_conversion(converted: Path, tiny_transformer: Path) -> None:
    model, source = open_source(converted), open_source(tiny_transformer)
    assert holds_original(model) and not holds_original(source)
    spec, tensors = original(model)
    assert spec.layers == source.spec.layers
    assert {name: tensor.read().tobytes() for name, tensor in tensors.items()} == {
        name: tensor.read().tobytes() for name, tensor in source.tensors.items()
    }


def test_no_file_has_such_a_name(converted: Path, tmp_path: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    run = tmp_path / "run"
    run.mkdir()
    for name in ("x" * 300, "org/" + "x" * 300, "a\0b"):
        config["provenance"]["source"] = name
        (converted / "config.json").write_text(json.dumps(config))
        (run / "run.json").write_text(json.dumps({"teacher": name}))
        assert find_teacher(converted) is None
        assert find_teacher(run) is None
