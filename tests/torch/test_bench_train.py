"""The benchmark of training steps on a tiny model: what it measures, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from supra_core.artifact import folder as artifact  # noqa: E402
from supra_core.conversion.linearize import LinearizeOptions, linearize  # noqa: E402
from supra_core.errors import SupraError  # noqa: E402
from supra_core.sources.source import open_source  # noqa: E402
from supra_torch.benchmark import train  # noqa: E402
from supra_torch.benchmark.train import ORIGINAL, benchmark, table  # noqa: E402

SETTINGS: dict[str, Any] = {
    "recipes": None, "kinds": ["uptrain"], "lengths": [32], "batch_tokens": 64, "steps": 2,
    "precision": "float32",
}  # fmt: skip


@pytest.fixture(scope="module")
def converted(tiny_transformer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, folder = open_source(tiny_transformer), tmp_path_factory.mktemp("converted") / "model"
    spec, tensors = linearize(source.spec, source.tensors, LinearizeOptions(preset="pure"))
    artifact.write(folder, spec, tensors, source.assets(), dtype="float32")
    return folder


@pytest.mark.parametrize(
    ("kinds", "lengths"),
    [
        (["distill"], [48]),
        pytest.param(["uptrain", "transfer", "distill"], [32, 48], marks=pytest.mark.slow),
    ],
)
def test_kinds_are_measured_beside_the_original(
    tiny_transformer: Path, kinds: list[str], lengths: list[int]
) -> None:
    result = benchmark(
        str(tiny_transformer),
        **{**SETTINGS, "kinds": kinds, "lengths": lengths},
    )
    names = [ORIGINAL, *(f"windowed: {kind}" for kind in kinds)]
    assert [(row["name"], row["length"]) for row in result["rows"]] == [
        (name, length) for length in lengths for name in names
    ]
    for row in result["rows"]:
        assert row["step_tokens"] == (64 if row["length"] == 32 else 48)
        assert row["tokens_per_second"] == row["step_tokens"] / row["seconds_median"]
        assert 0 < row["seconds_least"] <= row["seconds_median"] <= row["seconds_most"]
        # Torch alone is more than this resident.
        assert row["peak_memory_bytes"] > 50 * 2**20
    assert result["rows"][0]["speed_ratio"] == 1.0
    note = "length 48: a step has 48 tokens, in whole sequences"
    assert result["notes"] == [note]
    shown = table(result)
    assert [row[0] for row in shown.rows] == names * len(lengths)
    assert {len(row) for row in shown.rows} == {len(shown.columns)}
    assert note in shown.notes


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "kind"), [("lolcats", "uptrain"), ("lora", "distill")])
def test_adapters_are_trained_where_the_recipe_trains_them(
    tiny_transformer: Path, recipe: str, kind: str
) -> None:
    result = benchmark(str(tiny_transformer), **{**SETTINGS, "recipes": [recipe], "kinds": [kind]})
    assert result["rows"][-1]["name"] == f"{recipe}: {kind}"


@pytest.mark.slow
def test_a_linear_model_is_measured_alone_and_it_is_said(converted: Path) -> None:
    result = benchmark(str(converted), **SETTINGS)
    (row,) = result["rows"]
    assert (row["name"], row["speed_ratio"]) == ("uptrain", None)
    assert result["notes"] == [f"the original was not measured: {converted} is linear already"]
    with pytest.raises(SupraError, match="drop --recipe"):
        benchmark(str(converted), **{**SETTINGS, "recipes": ["pure"]})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "at least one step"),
        ({"kinds": ["guess"]}, r"field stages\.0\.kind"),
        ({"lengths": [1]}, "field sequence_length"),
        ({"precision": "half"}, "field precision"),
        ({"recipes": ["magic"]}, "unknown recipe 'magic'"),
    ],
)
def test_bad_input_is_named(tiny_transformer: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SupraError, match=message):
        benchmark(str(tiny_transformer), **{**SETTINGS, **settings})


@pytest.mark.slow
def test_what_is_measured_outlives_a_process_that_dies(
    converted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[list[str | None]] = []
    step = train._Trainer.step

    def dies(trainer: train._Trainer, number: int) -> str:
        if number == 4 and trainer.length >= 48:
            trainer._process.kill()
        return step(trainer, number)

    monkeypatch.setattr(train._Trainer, "step", dies)
    result = benchmark(
        str(converted), **{**SETTINGS, "lengths": [32, 48]},
        keep=lambda result: kept.append([row["reason"] for row in result["rows"]]),
    )  # fmt: skip
    reason = result["rows"][-1]["reason"]
    assert kept == [[None], [None, reason]]
    assert "'uptrain' at length 48 ended with code -9" in reason
    assert reason in result["notes"]
    assert result["rows"][-1]["tokens_per_second"] is None
    assert table(result).rows[-1][2:] == ("-",) * 7
    with pytest.raises(SupraError, match="at length 64 ended with code -9"):
        benchmark(str(converted), **{**SETTINGS, "lengths": [64]})


def test_a_process_that_cannot_begin_says_why(tmp_path: Path, tiny_transformer: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_transformer.iterdir():
        if file.suffix != ".safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SupraError, match="broken"):
        benchmark(str(broken), **SETTINGS)
