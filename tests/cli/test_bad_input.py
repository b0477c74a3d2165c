"""Bad input ends in one clear sentence on stderr and exit code 2, never in a traceback."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from supra_cli.main import app

runner = CliRunner()

Damage = Callable[[Path], None]


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _set(**fields: object) -> Damage:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def _drop_tensor(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


class _Dangerous:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with open(folder / "pytorch_model.bin", "wb") as file:
        pickle.dump({"weight": _Dangerous(folder / "was_run")}, file)


DAMAGES: dict[str, tuple[Damage, str]] = {
    "missing folder": (shutil.rmtree, "does not exist"),
    "truncated safetensors": (_truncate, "truncated or damaged"),
    "unknown model_type": (_set(model_type="wonder"), "model_type is 'wonder'"),
    "wrong shape": (_set(intermediate_size=47), "shape"),
    "missing tensor": (_drop_tensor, "model.layers.1.self_attn.q_proj.weight"),
    "a pickle that runs code": (_pickle, "pytorch_model.bin"),
}


def refused(*arguments: str | Path) -> str:
    """The one sentence of a command that was refused."""
    done = runner.invoke(app, [*map(str, arguments)])
    assert done.exit_code == 2, done.output
    lines = [line for line in done.stderr.splitlines() if line.startswith("supra: error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.output
    return lines[0].removeprefix("supra: error: ")


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_sources_are_refused(name: str, tiny_transformer: Path, tmp_path: Path) -> None:
    damage, expected = DAMAGES[name]
    source = tmp_path / "source"
    shutil.copytree(tiny_transformer, source)
    damage(source)
    assert expected in refused("convert", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (source / "was_run").exists()
    assert list(tmp_path.glob(".*")) == []  # nothing half-written stays


def test_existing_output_is_refused_and_kept(tiny_transformer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert "exists" in refused("convert", tiny_transformer, out)
    assert (out / "config.json").read_text() == "{}"
    done = runner.invoke(app, ["convert", str(tiny_transformer), str(out), "--force"])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("window", ["0", "-3"])
def test_windows_without_tokens_are_refused(
    window: str, tiny_transformer: Path, tmp_path: Path
) -> None:
    message = refused("convert", tiny_transformer, tmp_path / "out", "--window", window)
    assert "--window" in message


def test_a_window_needs_the_sum_normaliser(tiny_transformer: Path, tmp_path: Path) -> None:
    message = refused(
        "convert", tiny_transformer, tmp_path / "out", "--recipe", "paper", "--window", "8"
    )
    assert "window" in message


@pytest.mark.parametrize(
    "arguments",
    [
        ("--window", "many"),
        ("--recipe", "wonder"),
        ("--feature-map", "wonder"),
        ("--keep-softmax", "first"),
        ("--keep-softmax", "99"),
        ("--dtype", "float8"),
        ("--to", "wonder"),
        ("--no-linearize", "--window", "8"),
        ("--no-linearize", "--fold"),
        ("--window", "0"),
        ("--recipe", "paper", "--window", "8"),
    ],
    ids=" ".join,
)
def test_wrong_choices_end_with_exit_code_2(
    arguments: tuple[str, ...], tiny_transformer: Path, tmp_path: Path
) -> None:
    done = runner.invoke(app, ["convert", str(tiny_transformer), str(tmp_path / "out"), *arguments])
    assert done.exit_code == 2, done.output
    assert "rror: " in done.stderr
    assert not (tmp_path / "out").exists()


def test_other_commands_refuse_too(tiny_transformer: Path, text_file: Path, tmp_path: Path) -> None:
    model = tiny_transformer
    assert "--out" in refused("uptrain", model, "--data", text_file)
    assert "key=value" in refused(
        "uptrain", model, "--data", text_file, "--out", tmp_path / "run", "--set", "tokens"
    )
    assert "unknown backend" in refused("verify", model, "--backend", "wonder")
    assert "unknown" in refused("verify", model, "--form", "wonder")
    assert "cannot be read" in refused("verify", model, "--ids", tmp_path / "absent.npy")
    with_text = ("eval", model, "--data", text_file)
    for asked in (with_text, ("eval", model)):
        message = refused(*asked, "--tasks", "wonder")
        assert "wonder is none of perplexity, lambada, multiple_choice, " in message
    for option, least in (("limit", 2), ("length", 2), ("batch", 1), ("seed", 0)):
        message = refused(*with_text, f"--{option}", str(least - 1))
        assert f"{option} must be at least {least}, not {least - 1}" in message
    assert "mixes" in refused(*with_text, "--tasks", "wonder,perplexity")
    assert "no file" in refused(*with_text, "--tasks", "perplexity,lambada")
    assert "does not name" in refused(*with_text, "--tasks", "lambada")
    assert "nothing to measure" in refused("eval", model)
    assert "rename one" in refused(*with_text, "--data", text_file)
    assert "harness has its own data" in refused(*with_text, "--tasks", "arc_easy")
    share = ("uptrain", model, "--data", f"{text_file}:0.2", "--out", tmp_path / "run")
    assert "needs a second --data" in refused(*share)
    date = ("--set", "tokens=1979-05-27")
    assert "field tokens" in refused(
        "uptrain", model, "--data", text_file, "--out", tmp_path / "run", *date
    )
    (tmp_path / "there.json").touch()
    assert "--force" in refused(*with_text, "--out", tmp_path / "there.json")
    calibrated = ("convert", model, tmp_path / "made", "--calibration-text")
    demo = ("demo", "--model", model, "--out", tmp_path / "demo", "--data")
    for command in (calibrated, demo, ("eval", model, "--data")):
        assert "records, not one text" in refused(*command, tmp_path / "there.json")
    # A teacher that cannot be read is noticed before the model is measured.
    assert "absent" in refused(*with_text, "--teacher", tmp_path / "absent")
    assert "cannot be read" in refused("eval", model, "--data", tmp_path / "absent.txt")
    assert "temperature" in refused("generate", model, "hello", "--temperature", "-1")
    assert "does not exist" in refused("chat", tmp_path / "absent", "--backend", "torch")


def test_a_model_is_not_written_over_itself(tiny_transformer: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_transformer, model)
    before = {file.name: file.read_bytes() for file in model.iterdir()}
    for out in (model, tmp_path / "." / "model"):
        done = runner.invoke(app, ["convert", str(model), str(out), "--force", "--no-calibrate"])
        assert done.exit_code == 2
        assert "is the source itself: choose another folder" in done.stderr
    assert {file.name: file.read_bytes() for file in model.iterdir()} == before


def test_what_may_not_be_replaced_is_refused_before_the_work(
    tiny_transformer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    monkeypatch.setattr(
        "supra_core.conversion.convert.open_source", lambda *a, **k: pytest.fail("too late")
    )
    command = ["convert", str(tiny_transformer), str(out), "--force", "--no-calibrate"]
    done = runner.invoke(app, command)
    assert done.exit_code == 2
    assert "holds no config.json, so it is not replaced even by force" in done.stderr


# Longer than the name of a file can be, as a prompt given in a model's place.
LONG = "Why is the sky blue? " * 20


def test_a_text_in_the_place_of_a_path_is_refused(tiny_transformer: Path, tmp_path: Path) -> None:
    model, out = tiny_transformer, tmp_path / "out"
    prepare = ("data", "prepare", "--tokenizer", model)
    train = ("uptrain", model, "--data")
    for arguments in (
        ("inspect", LONG), ("convert", LONG, out), ("generate", LONG, model), ("verify", LONG),
        ("plan", LONG), ("report", LONG), ("eval", LONG, "--data", __file__),
        ("eval", model, "--data", LONG), ("eval", model, "--data", __file__, "--teacher", LONG),
        (*prepare, LONG, "--out", out), (*train, LONG, "--out", out),
        ("demo", "--model", model, "--data", LONG, "--out", out),
        # And in that of an output.
        ("convert", model, LONG), ("push", LONG, "org/name"), ("verify", LONG, "--checksums"),
        (*prepare, __file__, "--out", LONG), (*train, __file__, "--out", LONG),
        ("data", "synthesize", model, LONG, "--length", "64"),
    ):  # fmt: skip
        assert "Why is the sky blue?" in refused(*arguments)
    assert not out.exists()


def test_a_source_of_any_length_is_no_teacher(
    tiny_transformer: Path, text_file: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    done = runner.invoke(app, ["convert", str(tiny_transformer), str(model), "--no-calibrate"])
    assert done.exit_code == 0, done.output
    config = json.loads((model / "config.json").read_text())
    for source in ("x" * 300, "org/" + "x" * 300, "org/x.git", "org/x-"):
        config["provenance"]["source"] = source
        (model / "config.json").write_text(json.dumps(config))
        done = runner.invoke(
            app,
            ["eval", str(model), "--data", str(text_file), "--limit", "20", "--backend", "torch"],
        )
        assert done.exit_code == 0, done.output
        assert "no teacher" in done.stderr


def test_what_may_not_be_read_is_named(tiny_transformer: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_transformer, model)
    for mode in (0, 0o400, 0o100):
        model.chmod(mode)
        try:
            if os.access(model, os.R_OK | os.X_OK):
                pytest.skip("this user may read everything")
            for command in ("inspect", "plan"):
                assert "cannot be read (Permission denied)" in refused(command, model)
        finally:
            model.chmod(0o700)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x could not be used (Perm"),
        (OSError(errno.EIO, "Input/output error"), "(Input/output error): mend that"),
        (OSError(), "(OSError): mend that"),
    ],
    ids=["file", "system", "nothing"],
)
def test_what_nobody_foresaw_is_a_sentence_too(
    error: OSError, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("supra_core.sources.source.open_source", fail)
    assert says in refused("inspect", "model")


def test_who_closes_the_pipe_hears_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("supra_core.sources.source.open_source", fail)
    done = runner.invoke(app, ["inspect", "model"])
    assert (done.exit_code, done.stderr) == (1, "")


def test_numbers_without_end_are_refused(
    tiny_transformer: Path, text_file: Path, tmp_path: Path
) -> None:
    for number in ("inf", "nan", "1e308"):
        pytest.importorskip("uvicorn")
        assert "--keep-gib" in refused("serve", tiny_transformer, "--keep-gib", number)
    for number in ("inf", "nan"):
        assert "--minutes" in refused("demo", "--minutes", number, "--out", tmp_path / "demo")
        for setting in ("share", "batch_share", "learning_rate", "weight_decay"):
            message = refused(
                "uptrain", tiny_transformer, "--data", text_file, "--out", tmp_path / "run",
                "--set", f"stages.0.{setting}={number}",
            )  # fmt: skip
            assert setting in message
    assert not (tmp_path / "demo").exists() and not (tmp_path / "run").exists()


def test_logits_that_cannot_be_kept_are_refused_before_the_work(
    tiny_transformer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supra_core.measure.verify._logits", lambda *_: pytest.fail("too late"))
    (tmp_path / "file").touch()
    command = ("verify", tiny_transformer, "--backend", "reference", "--save-logits")
    assert "is a file: name a folder" in refused(*command, tmp_path / "file")
    assert "could not be written (Not a directory)" in refused(*command, tmp_path / "file" / "x")
    assert "could not be written (File name too long)" in refused(*command, tmp_path / LONG)


def test_the_current_folder_is_not_replaced(
    tiny_transformer: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (
        ("convert", tiny_transformer, "."),
        ("data", "prepare", text_file, "--tokenizer", tiny_transformer, "--out", "."),
    ):
        assert "is or holds the current folder" in refused(*command)
    assert list(tmp_path.iterdir()) == [] and not list(tmp_path.parent.glob(".*preparing"))
