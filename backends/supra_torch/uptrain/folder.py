"""A run's folder: whose it is, and its log.

``RUN/run.json`` resolved config and versions; ``metrics.jsonl`` one object a step;
``data/`` the tokenised text; ``checkpoints/``; ``model/`` the finished artifact.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from supra_core.errors import SupraError
from supra_core.formats import safetensors
from supra_core.formats.atomic import atomic_file, clear_partial, is_partial, writing
from supra_core.formats.jsonfile import read_object
from supra_core.tensors import TensorSource
from supra_torch.uptrain.checkpoint import Place
from supra_torch.uptrain.config import UptrainConfig

CALIBRATED = "calibrated.safetensors"
_CALIBRATION = "calibration"


def metrics_of(run: Path) -> Path:
    """The log; it exists from the first step on."""
    return run / "metrics.jsonl"


def refuse_another_run(run: Path, config: UptrainConfig) -> None:
    """Raise SupraError when ``run`` is no run, or one that trained with other settings."""
    file = run / "run.json"
    with writing(run):
        if run.exists() and not run.is_dir():
            raise SupraError(f"{run} is a file: name a folder for the run")
        if not file.is_file():
            if run.is_dir() and not all(map(is_partial, run.iterdir())):
                raise SupraError(f"{run} exists and is no uptraining run: name another run folder")
            return
    record, stated = read_object(file), config.model_dump(mode="json")
    before = record.get("config")
    if not isinstance(before, dict):
        raise SupraError(f"{file} has no config: name another run folder")
    # A setting that is younger than the run had its default then, but for this one.
    defaults = {key: field.default for key, field in UptrainConfig.model_fields.items()}
    before = defaults | {"documents": "joined"} | before
    # Runs that are older than this field have no directory: their paths are those of this one.
    begun_in, here = str(record.get("directory", "")), os.getcwd()
    different = [
        key
        for key in stated
        if key not in config.FREE
        and _located(key, before[key], begun_in) != _located(key, stated[key], here)
    ]
    if different and metrics_of(run).is_file():
        key = different[0]
        values = (before[key], stated[key])
        plain = all(isinstance(value, str | int | float) for value in values)
        said = f" ({key} was {values[0]} and is {values[1]} now)" if plain else ""
        raise SupraError(
            f"{run} was begun with another setting of {key}{said}: resume with the same settings, "
            "or name another run folder"
        )
    if different:
        # It never took a step: a corrected setting may begin it again.
        unclaim(run, existed=True)


def claim(run: Path, config: UptrainConfig, precision: str, processes: int) -> None:
    """Write run.json, unless the run has one already."""
    file = run / "run.json"
    if file.is_file():
        return
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
    packages = ("supra-lm", "torch", "numpy", "safetensors", "tokenizers")
    record = {
        "config": config.model_dump(mode="json"),
        "directory": os.getcwd(),
        "teacher": _absolute(config.teacher or config.model),
        "precision": precision,
        "processes": processes,
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "git": git_state(Path(__file__)),
        "machine": platform.machine(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with atomic_file(file) as beside:
        beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def git_state(file: Path) -> dict[str, Any] | None:
    """The commit of the checkout that a file belongs to, and whether files differ from it.

    None where it belongs to none, or there is no git.
    """

    def git(*arguments: str) -> str:
        found = subprocess.run(
            ["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, check=True,
            timeout=10,
        )  # fmt: skip
        return found.stdout.strip()

    try:
        # An environment inside of somebody's repository is no checkout of ours.
        git("ls-files", "--error-unmatch", file.name)
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def unclaim(run: Path, existed: bool) -> None:
    """Remove what a run that never took a step has made; only an ``existed`` folder stays."""
    (run / CALIBRATED).unlink(missing_ok=True)
    shutil.rmtree(run / "data", ignore_errors=True)
    # Last: without it the folder is no run's.
    (run / "run.json").unlink()
    if not existed:
        run.rmdir()


def clear(run: Path) -> None:
    """Remove what a killed run had not finished writing."""
    with writing(run):
        for folder in (run, run / "data", run / "checkpoints"):
            clear_partial(folder)


def log(run: Path, record: Mapping[str, Any]) -> None:
    """Append one line to the log; WriteError where there is no room for it."""
    with writing(metrics_of(run)), open(metrics_of(run), "a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def trim_log(run: Path, place: Place) -> None:
    """Drop what was logged after the checkpoint that the run goes on from."""
    file = metrics_of(run)
    if not file.is_file():
        return
    kept = []
    for line in file.read_text("utf-8", errors="replace").splitlines():
        # A kill or a full disk may have cut a line off.
        with suppress(json.JSONDecodeError):
            if _is_before(json.loads(line), place):
                kept.append(line + "\n")
    with atomic_file(file) as beside:
        beside.write_text("".join(kept), encoding="utf-8")


def _is_before(record: Mapping[str, Any], place: Place) -> bool:
    """Whether a line was logged by the time of a checkpoint."""
    if "calibration" in record or record["step"] < place.step:
        return True
    measured = "evaluation" not in record or place.perplexity is not None
    return record["step"] == place.step > 0 and measured


def log_calibration(run: Path) -> None:
    """Log how the run's calibration went, unless that has been logged."""
    stated = safetensors.metadata(run / CALIBRATED).get(_CALIBRATION)
    file = metrics_of(run)
    if stated and not (file.is_file() and '"calibration"' in file.read_text("utf-8")):
        log(run, json.loads(stated))


def write_calibrated(run: Path, tensors: TensorSource, record: Mapping[str, Any]) -> None:
    """Keep what calibrating made, and how it went, in one file."""
    with atomic_file(run / CALIBRATED) as beside:
        safetensors.write_file(beside, tensors, {_CALIBRATION: json.dumps(record)})


def logged_teacher_perplexity(run: Path) -> float | None:
    """What the run's beginning logged of its teacher; None if there is no such line."""
    file = metrics_of(run)
    for line in file.read_text("utf-8").splitlines() if file.is_file() else ():
        if '"teacher_perplexity"' in line:
            found: float | None = json.loads(line)["teacher_perplexity"]
            return found
    return None


def logged_steps(run: Path, place: Place) -> list[dict[str, Any]]:
    """The lines of the stage under way up to ``place``, a step each."""
    if not place.stage_step:
        return []
    records = [json.loads(line) for line in metrics_of(run).read_text("utf-8").splitlines()]
    first = place.step - place.stage_step
    return [record for record in records if "loss" in record and record["step"] > first]


def _absolute(path: str, directory: str = "") -> str:
    """A path as seen from ``directory``, from wherever it is looked for; a hub id as it is."""
    place = os.path.join(directory, path)
    return os.path.realpath(place) if os.path.exists(place) else path


def _located(key: str, value: Any, directory: str) -> Any:
    """A setting, its paths as they are from anywhere: one file has many names."""
    if key == "data" and isinstance(value, list):
        return [_located(key, part, directory) for part in value]
    if key == "data" and isinstance(value, dict):
        return value | {"path": _located(key, value.get("path"), directory)}
    is_path = key in ("model", "teacher", "data") or (key == "recipe" and ".toml" in str(value))
    if not is_path or not isinstance(value, str):
        return value
    return _absolute(value, directory)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
