"""``supra plan``: what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from typer.testing import CliRunner  # noqa: E402

from supra_cli.main import app  # noqa: E402
from tests.tiny_families import FAMILIES  # noqa: E402

runner = CliRunner()
SMALL = ["--set", "sequence_length=64", "--set", "batch_tokens=256", "--tokens", "100000"]


def planned(*arguments: str | Path) -> dict[str, Any]:
    done = runner.invoke(app, ["plan", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_a_config_alone_is_enough(tiny_transformer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "described"
    folder.mkdir()
    config = folder / "config.json"
    config.write_bytes((tiny_transformer / "config.json").read_bytes())
    whole = planned(tiny_transformer, *SMALL, "--recipe", "paper")
    for alone in (folder, config):
        described = planned(alone, *SMALL, "--recipe", "paper")
        assert described["settings"].pop("model") == str(alone)
        assert described == {
            **whole, "settings": {k: v for k, v in whole["settings"].items() if k != "model"}
        }  # fmt: skip


def test_a_run_s_settings_are_planned(tiny_transformer: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        f'model = "{tiny_transformer}"\ndata = "absent"\nrecipe = "paper"\ntokens = 64000\n'
        "sequence_length = 64\nbatch_tokens = 640\n"
    )
    result = planned(file, "--gpus", "2", "--gpu", "A100", "--price", "2")
    (stage,) = result["stages"]
    assert stage["steps"] == 100
    assert stage["step_tokens"] == 640
    assert result["seconds"] == pytest.approx(100 * stage["step_seconds"])
    assert result["cost"] == pytest.approx(2 * 2 * result["seconds"] / 3600)
    assert result["peak_bytes"] == sum(stage["memory_bytes"].values())
    assert result["fits"]


def test_experts_are_planned_from_a_config_alone(tmp_path: Path) -> None:
    tiny = FAMILIES["mixtral"]
    stated = {"model_type": tiny.model_type, **tiny.config}
    (tmp_path / "config.json").write_text(json.dumps(stated))
    done = runner.invoke(app, ["plan", str(tmp_path), *SMALL, "--recipe", "paper"])
    found = re.findall(r"(\d+) (?:parameters|of them)", done.output.replace(",", ""))
    total, active = map(int, found)
    # Three layers of five experts, of which a token goes through two.
    assert total - active == 3 * 3 * 3 * 24 * 40


def test_people_see_memory_time_and_cost(tiny_transformer: Path) -> None:
    done = runner.invoke(app, ["plan", str(tiny_transformer), *SMALL, "--price", "3"])
    assert done.exit_code == 0, done.output
    for text in ("transfer", "distill", "optimiser", "of 80.00 GB: fits", "device hours", "KiB"):
        assert text in done.stdout, text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent does not exist: check the path, or name a hub id org/name"),
        (["nowhere/config.json"], "nowhere/config.json does not exist: check the path"),
        (["TINY", "--price", "-1"], "--price -1: must be at least 0 and below 1e9"),
        (["TINY", "--price", "inf"], "--price inf: must be at least 0 and below 1e9"),
        (["TINY", "--gpus", "1000000"], "1000000 devices are too many: plan at most 65536"),
        (
            ["TINY", "--set", "sequence_length=2097152"],
            "field sequence_length is 2097152: a plan",
        ),
        (["TINY", "--gpu", "abacus"], "--gpu abacus is unknown: use one of b200,"),
        (["TINY", "--tokens", "0"], "field tokens: input should be greater than or equal to 1"),
        (["TINY", "--set", "model=3"], "field model: input should be a valid string"),
    ],
)
def test_bad_input_is_one_sentence(
    tiny_transformer: Path, arguments: list[str], message: str
) -> None:
    named = [str(tiny_transformer) if text == "TINY" else text for text in arguments]
    done = runner.invoke(app, ["plan", *named])
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_every_device_takes_the_recipe_s_batch(tiny_transformer: Path) -> None:
    alone, many = (
        planned(tiny_transformer, "--recipe", "paper", "--gpus", count) for count in ("1", "8")
    )
    for stage, larger in zip(alone["stages"], many["stages"], strict=True):
        assert larger["step_tokens"] == 8 * stage["step_tokens"]


def test_quality_is_that_of_a_measured_run(tiny_transformer: Path) -> None:
    near = planned(tiny_transformer, *SMALL, "--tokens", "500000")["measured_quality"]
    assert (near["recipe"], near["tokens"]) == ("windowed", 301_056)
    other = planned(tiny_transformer, *SMALL, "--recipe", "pure", "--tokens", "100")
    assert other["measured_quality"]["tokens"] == 30_720
    done = runner.invoke(app, ["plan", str(tiny_transformer), *SMALL, "--recipe", "hybrid"])
    assert "no run with hybrid was measured" in " ".join(done.output.split())
