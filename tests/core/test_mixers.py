"""A mixer is one thing in one place: nothing outside the mixers' rooms asks which kind it has."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supra_core.artifact import mlx_file
from supra_core.artifact.config import FORMAT_VERSION, config_to_spec, spec_to_config
from supra_core.artifact.modules import joined, modules_of
from supra_core.errors import SpecError
from supra_core.mixers import KINDS, PRESETS
from supra_core.model.layout import tensor_shapes
from supra_core.model.spec import ModelSpec, format_version
from tests.tiny_models import SPECS, reference

ROOT = Path(__file__).resolve().parents[2]
# What tells kinds of mixers, or what they are made of, apart.
CLASSES = {
    *(kind.__name__ for kind in KINDS), "SoftmaxMixer", "LinearMixer",
    "SumNormaliser", "GroupNorm", "Projection", "Folded", "Identity",
    "NoDecay", "LightningDecay", "RetnetDecay", "LearnedDecay",
}  # fmt: skip
KIND = re.compile(r"(mixer|decay|normaliser|projection)\.kind$")
NAMES = {kind.kind for kind in KINDS}
PACKAGES = ("supra_core", "cli", "backends/supra_torch", "backends/supra_mlx", "benchmarks")


def _in_a_mixers_room(path: Path) -> bool:
    return "mixers" in (*path.parent.parts, path.stem)


def _branches(tree: ast.AST) -> Iterator[str]:
    """The places that branch on a kind."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            if CLASSES & set(re.findall(r"\w+", ast.unparse(node.args[1]))):
                yield ast.unparse(node)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = {side.value for side in sides if isinstance(side, ast.Constant)} & NAMES
            if named or any(KIND.search(ast.unparse(side)) for side in sides):
                yield ast.unparse(node)
        elif isinstance(node, ast.match_case) and CLASSES & set(
            re.findall(r"\w+", ast.unparse(node.pattern))
        ):
            yield ast.unparse(node.pattern)


@pytest.mark.parametrize(
    "package",
    PACKAGES,
)
def test_nothing_outside_the_mixers_rooms_branches_on_a_kind(package: str) -> None:
    found = {
        f"{path.relative_to(ROOT)}: {branch}"
        for path in sorted((ROOT / package).rglob("*.py"))
        if not _in_a_mixers_room(path.relative_to(ROOT))
        for branch in _branches(ast.parse(path.read_bytes()))
    }
    assert found == set()


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(layer.mixer, LinearAttention)", "isinstance(x, softmax.SoftmaxAttention | int)",
        "layer.mixer.kind == 'x'", "mixer.decay.kind in ('learned', 'none')",
        "kind != 'softmax_attention'", "match mixer:\n    case LinearAttention():\n        pass",
    ],
)  # fmt: skip
def test_the_search_finds_branches(code: str) -> None:
    assert list(_branches(ast.parse(code)))


@cache
def _read_plainly() -> Callable[[dict[str, Any], str], ModelSpec]:
    """What reads a config in the file for stock mlx-lm, where pydantic is absent."""
    namespace: dict[str, Any] = {"__name__": "plain"}
    exec(joined(mlx_file._HEAD, "supra_core.artifact.config"), namespace)
    return namespace["config_to_spec"]  # type: ignore[no-any-return]


def config_to_spec_plainly(config: dict[str, Any], where: str) -> ModelSpec:
    return _read_plainly()(config, where)


@pytest.mark.parametrize("name", SPECS)
def test_a_config_is_read_alike_without_pydantic(name: str) -> None:
    config = json.loads(json.dumps(spec_to_config(SPECS[name], "float32")))
    assert config_to_spec(config, "config.json") == SPECS[name]
    assert config_to_spec_plainly(config, "config.json").to_dict() == SPECS[name].to_dict()


@pytest.mark.parametrize("read", [config_to_spec, config_to_spec_plainly])
def test_unknown_kinds_are_refused_by_name(read: Any) -> None:
    config = spec_to_config(SPECS["hybrid"], "float32")
    config["mixers"][0]["kind"] = "perceptron"
    known = ", ".join(kind.kind for kind in KINDS)
    with pytest.raises(Exception, match=f"kind 'perceptron' is unknown: use one of {known}"):
        read(config, "config.json")


@pytest.mark.parametrize(
    ("file_name", "wrong"), [("rope", "rotary"), ("rope", "rope_position")]
)  # fmt: skip
def test_files_have_one_name_for_a_field(file_name: str, wrong: str) -> None:
    """Those in Python are others, and no file may use them."""
    config = spec_to_config(SPECS["norms_after"], "float32")
    index = next(i for i, mixer in enumerate(config["mixers"]) if file_name in mixer)
    config["mixers"][index][wrong] = config["mixers"][index].pop(file_name)
    with pytest.raises(SpecError, match=wrong):
        config_to_spec(config, "config.json")


def test_every_kind_is_registered_and_in_the_stock_file() -> None:
    files = {path.stem for path in (ROOT / "supra_core/mixers").glob("*.py")}
    found = {name.rsplit(".", 1)[1] for name in modules_of("supra_mlx.model")}
    assert files - {"__init__"} <= found
    assert len({kind.kind for kind in KINDS}) == len(KINDS)
    assert set(PRESETS) >= {"paper", "windowed", "pure"}
    assert max(kind.format_version for kind in KINDS) <= FORMAT_VERSION


@pytest.mark.parametrize("name", SPECS)
def test_what_a_kind_answers_fits_together(name: str) -> None:
    """Tensors, new tensors, memory by context, and the memory that the reference makes."""
    spec: ModelSpec = SPECS[name]
    _, (state,) = reference(spec).prefill(np.zeros((1, 30), dtype=int))
    shapes = tensor_shapes(spec)
    assert 1 <= format_version(spec) <= FORMAT_VERSION
    for index, layer in enumerate(spec.layers):
        mixer = layer.mixer
        prefix = f"model.layers.{index}.self_attn."
        stated = {n.removeprefix(prefix) for n in shapes if n.startswith(prefix)}
        assert stated == set(mixer.tensors(spec)) >= set(mixer.new_tensors(spec))
        assert mixer.describe(spec) and mixer.layer_type
        at = [mixer.state_bytes(spec, 2, context) for context in (0, 1, 29, 30, 1000)]
        assert at == sorted(at)
        assert (at[-1] > at[-2]) == (mixer.memory_grows or (mixer.fills_at or 0) > 30)
        # Of the reference: 8 bytes an element, and no room for tokens that never came.
        kept = sum(array.nbytes for array in state.layers[index].values())
        if not mixer.joins_window:
            float32 = mixer.state_bytes(spec, 8, 30)
            assert kept == (2 * float32 if mixer.converted and mixer.holds_all else float32)
