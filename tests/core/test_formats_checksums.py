"""SHA256SUMS: of every file, as sha256sum has it; what differs or is missing is named."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from supra_cli.main import app
from supra_core.artifact import folder as artifact
from supra_core.errors import FormatError
from supra_core.formats import checksums, huggingface, safetensors
from supra_core.formats.checksums import NAME, Problem, check
from supra_core.formats.openlm import checkpoint as openlm
from tests.fuzz.formats import PUBLISHED
from tests.tiny_models import SPECS, lazy_weights

runner = CliRunner()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    spec = SPECS["transformer"]
    out = tmp_path / "model"
    weights = lazy_weights(spec)
    some = dict(list(weights.items())[:2])
    artifact.write(out, spec, weights, {"tokenizer.json": b"{}"}, dtype="float32", originals=some)
    return out


def _expected(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name != NAME
    }


def _stated(folder: Path) -> dict[str, str]:
    lines = (folder / NAME).read_text().splitlines()
    return {line[66:]: line[:64] for line in lines}


def test_every_file_is_listed(folder: Path) -> None:
    assert _stated(folder) == _expected(folder)
    assert {"model.safetensors", "original.safetensors", "tokenizer.json"} < _stated(folder).keys()
    assert list(_stated(folder)) == sorted(_stated(folder))
    assert check(folder).passed


def test_the_system_program_agrees(folder: Path) -> None:
    program = shutil.which("sha256sum")
    if program is None:
        pytest.skip("this system has no sha256sum")
    subprocess.run([program, "-c", "--strict", NAME], cwd=folder, check=True)
    (folder / "config.json").write_text("{}")
    done = subprocess.run([program, "-c", NAME], cwd=folder, capture_output=True, check=False)
    assert done.returncode == 1


def test_every_writer_and_shards(tmp_path: Path) -> None:
    spec = SPECS["transformer"]
    plain = SPECS["sliding"].with_mixers([layer.mixer for layer in spec.layers])
    from dataclasses import replace

    plain = replace(plain, attention_bias="none", value_head_dim=plain.head_dim)
    huggingface.write(tmp_path / "hf", plain, lazy_weights(plain), {}, dtype="float16")
    openlm.write(tmp_path / "openlm", PUBLISHED, lazy_weights(PUBLISHED), {}, dtype="float32")
    for name in ("hf", "openlm"):
        assert _stated(tmp_path / name) == _expected(tmp_path / name)
    (tmp_path / "shards").mkdir()
    digests = safetensors.write_folder(tmp_path / "shards", lazy_weights(spec), shard_bytes=5000)
    assert len(digests) > 2
    checksums.write(tmp_path / "shards", digests)
    assert _stated(tmp_path / "shards") == _expected(tmp_path / "shards")


def test_what_differs_and_what_is_missing(folder: Path) -> None:
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "README.md").unlink()
    (folder / "surplus.txt").write_text("x")
    found = check(folder)
    assert found.problems == (
        Problem("README.md", "is missing"), Problem("model.safetensors", "differs"),
    )  # fmt: skip
    assert found.unlisted == ("surplus.txt",)
    assert not found.passed
    done = runner.invoke(app, ["verify", "--checksums", str(folder), "--json"])
    assert done.exit_code == 1
    result = json.loads(done.stdout)
    assert result["problems"] == [
        {"file": "README.md", "problem": "is missing"},
        {"file": "model.safetensors", "problem": "differs"},
    ]
    assert (result["passed"], result["unlisted"]) == (False, ["surplus.txt"])
    done = runner.invoke(app, ["verify", "--checksums", str(folder)])
    assert done.exit_code == 1
    assert f"{folder / 'model.safetensors'} differs" in done.stderr


def test_the_command_passes(folder: Path) -> None:
    done = runner.invoke(app, ["verify", "--checksums", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["passed"] is True
    done = runner.invoke(app, ["verify", "--checksums", str(folder)])
    assert done.exit_code == 0
    assert "7 of 7 files" in done.stderr


def test_bad_input(folder: Path, tmp_path: Path) -> None:
    for arguments in (
        [str(folder), "--text", "x"], [str(folder), str(folder)], [str(tmp_path / "none")],
        [str(tmp_path)], [str(folder / "config.json")],
    ):  # fmt: skip
        done = runner.invoke(app, ["verify", "--checksums", *arguments])
        assert done.exit_code == 2, done.output
        assert "supra: error: " in done.stderr


@pytest.mark.parametrize(
    "text",
    [
        "x\n", "0" * 64 + "\n", "0" * 64 + "  \n", "0" * 63 + "  config.json\n",
        "0" * 64 + "  ../config.json\n", "0" * 64 + "  /etc/passwd\n", "0" * 64 + "  ..\n",
        ("0" * 64 + "  config.json\n") * 2, "\\" + "0" * 64 + "  a\\nb\n", "\xff", "",
    ],
)  # fmt: skip
def test_lists_that_are_none(folder: Path, text: str) -> None:
    (folder / NAME).write_text(text, encoding="latin1")
    with pytest.raises(FormatError, match=NAME):
        check(folder)


def test_a_link_is_not_followed_out(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/passwd")
    with pytest.raises(FormatError, match="leads out of its folder"):
        check(folder)
