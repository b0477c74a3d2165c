"""The spec of a model without its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from supra_core.artifact.config import spec_to_config
from supra_core.errors import SupraError
from supra_core.sources.outline import outline
from supra_core.sources.source import open_source
from tests.tiny_models import SPECS


def test_a_folder_with_weights_and_its_config_say_the_same(
    tiny_transformer: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_transformer / "config.json").read_bytes())
    whole = open_source(tiny_transformer).spec
    assert outline(tiny_transformer) == whole
    for alone in (tmp_path, tmp_path / "config.json"):
        assert outline(alone).layers == whole.layers
        assert outline(alone).hidden_size == whole.hidden_size


@pytest.mark.parametrize("name", SPECS)
def test_an_artifact_s_config_is_its_spec(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(spec_to_config(SPECS[name], "float32")))
    assert outline(tmp_path) == SPECS[name]


def test_what_holds_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SupraError, match=r"config\.json"):
        outline(tmp_path)
    with pytest.raises(SupraError, match="does not exist: check the path"):
        outline(tmp_path / "absent")


def test_a_path_that_no_file_can_have(tmp_path: Path) -> None:
    for path in ("x" * 300, tmp_path / ("x" * 300) / "config.json"):
        with pytest.raises(SupraError, match="does not exist: check the path"):
            outline(path)
