"""A run's folder: which run it belongs to, and its log.

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
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np

from supra_core.errors import FormatError, SupraError
from supra_core.formats import checksums, safetensors
from supra_core.formats.atomic import atomic_file, clear_partial, is_partial, writing
from supra_core.formats.finite import first_not_finite
from supra_core.formats.jsonfile import parse, read_object, reason
from supra_core.measure.machine import versions
from supra_core.sources.source import RUN_FILE
from supra_core.tensors import LazyTensor, TensorSource
from supra_torch.recipes.config import UptrainConfig
from supra_torch.run_folder.checkpoint import Place

CALIBRATED = "calibrated.safetensors"
_CALIBRATION = "calibration"


def metrics_of(run: Path) -> Path:
    """The log; it exists once the first line is written."""
    return run / "metrics.jsonl"


def refuse_another_run(run: Path, config: UptrainConfig) -> None:
    """Raise SupraError when ``run`` is not a run, or one that trained with other settings."""
    file = run / RUN_FILE
    with writing(run):
        if run.exists() and not run.is_dir():
            raise SupraError(f"{run} is a file: name a folder for the run")
        if not file.is_file():
            if run.is_dir() and not all(map(is_partial, run.iterdir())):
                raise SupraError(
                    f"{run} exists and is not an uptraining run: name another run folder"
                )
            return
    record, stated = read_object(file), config.model_dump(mode="json")
    before = record.get("config")
    if not isinstance(before, dict):
        raise SupraError(f"{file} has no config: name another run folder")
    # A setting newer than the run had its default then, except for this one.
    defaults = {key: field.default for key, field in UptrainConfig.model_fields.items()}
    before = defaults | {"documents": "joined"} | before
    # Runs older than this field have no directory: their paths are relative to this one.
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
            f"{run} was started with another setting of {key}{said}: resume with the same "
            "settings, or name another run folder"
        )
    if different:
        # It never took a step: a corrected setting may begin it again.
        unclaim(run, existed=True)


def claim(run: Path, config: UptrainConfig, precision: str, processes: int) -> None:
    """Write run.json, unless the run has one already."""
    file = run / RUN_FILE
    if file.is_file():
        return
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
    record = {
        "config": config.model_dump(mode="json"),
        "directory": os.getcwd(),
        "teacher": _absolute(config.teacher or config.model),
        "precision": precision,
        "processes": processes,
        "versions": versions("torch", "numpy", "safetensors", "tokenizers"),
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
    """Remove the files of a run that never took a step, and its folder unless it ``existed``."""
    for name in (CALIBRATED, checksums.NAME):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "data", ignore_errors=True)
    # Last: without it the folder is no run's.
    (run / RUN_FILE).unlink()
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
    """Drop what was logged after the checkpoint that the run resumes from."""
    kept = [line + "\n" for line, record in _logged(run) if _is_before(record, place)]
    file = metrics_of(run)
    if file.is_file():
        with atomic_file(file) as beside:
            beside.write_text("".join(kept), encoding="utf-8")


def _logged(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of the log with their records, except for a last line that was cut off.

    Raises FormatError for a line that no run wrote.
    """
    file = metrics_of(run)
    if not file.is_file():
        return
    lines = file.read_text("utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            record = parse(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
            for name, kinds in _LOGGED.items():
                if name in record and type(record[name]) not in kinds:
                    raise ValueError(f"field {name}")
            taken = "loss" in record and "left_out" not in record
            needed = ("loss", "gradient_norm") if taken else ()
            if any(record.get(name) is None for name in needed):
                raise ValueError("no loss or gradient_norm")
            if "calibration" not in record and "step" not in record:
                raise ValueError("no step")
        except ValueError as error:
            # A kill or a full disk may have cut it off.
            if number == len(lines):
                return
            raise FormatError(
                f"{file}, line {number} is not a line of an uptraining run ({reason(error)}): "
                "restore the file, or remove the line"
            ) from None
        yield line, record


# The fields that a run reads of its own log, and their types.
_LOGGED: dict[str, tuple[type, ...]] = {
    "step": (int,),
    "loss": (int, float, NoneType),
    "gradient_norm": (int, float, NoneType),
    "teacher_perplexity": (int, float, NoneType),
}


def _is_before(record: Mapping[str, Any], place: Place) -> bool:
    """Whether a line was logged before a checkpoint was taken."""
    if "calibration" in record or record["step"] < place.step:
        return True
    measured = "evaluation" not in record or place.perplexity is not None
    return record["step"] == place.step > 0 and measured


def log_calibration(run: Path) -> None:
    """Log the run's calibration, unless it has been logged."""
    file = run / CALIBRATED
    stated = safetensors.metadata(file).get(_CALIBRATION)
    if not stated or any("calibration" in record for _, record in _logged(run)):
        return
    try:
        record = parse(stated)
    except ValueError:
        record = None
    if not isinstance(record, dict) or "calibration" not in record or record.get("step") != 0:
        raise FormatError(
            f"{file}: its metadata hold no calibration record: delete it, to calibrate again"
        )
    log(run, record)


def write_calibrated(run: Path, tensors: TensorSource, record: Mapping[str, Any]) -> None:
    """Write the calibrated tensors and their record to one file, with a checksum beside it."""
    with atomic_file(run / CALIBRATED) as beside:
        digest = safetensors.write_file(beside, tensors, {_CALIBRATION: json.dumps(record)})
        # First: a file without a checksum would be taken for an older version's.
        checksums.write_sums(run, {CALIBRATED: digest})


def read_calibrated(run: Path, begins: TensorSource) -> dict[str, LazyTensor]:
    """The calibrated ones of the tensors ``begins``.

    Raises FormatError for a file that is not as it was written, or is another model's.
    """
    file = run / CALIBRATED
    remedy = "delete it, to calibrate again"
    checksums.refuse_changed(run, remedy)
    found = safetensors.read_file(file)
    for name, tensor in found.items():
        wanted = begins.get(name)
        if wanted is None or tensor.shape != wanted.shape or tensor.dtype != np.float32:
            said = f"{tensor.dtype} {list(tensor.shape)}"
            raise FormatError(f"{file}: {name} is {said}, unlike the model's: {remedy}")
    broken = first_not_finite(found)
    if broken is not None:
        raise FormatError(f"{file}: {broken} holds NaN or infinity: {remedy}")
    return found


def logged_teacher_perplexity(run: Path) -> float | None:
    """The teacher's held-out perplexity from the log; None if there is no such line."""
    stated = (r["teacher_perplexity"] for _, r in _logged(run) if "teacher_perplexity" in r)
    return next(stated, None)


def logged_steps(run: Path, place: Place) -> list[dict[str, Any]]:
    """The logged steps of the current stage, up to ``place``."""
    if not place.stage_step:
        return []
    first = place.step - place.stage_step
    return [r for _, r in _logged(run) if "loss" in r and r["step"] > first]


def _absolute(path: str, directory: str = "") -> str:
    """A path relative to ``directory`` as an absolute one; a hub id as it is."""
    place = os.path.join(directory, path)
    return os.path.realpath(place) if os.path.exists(place) else path


def _located(key: str, value: Any, directory: str) -> Any:
    """A setting with absolute paths, so that two names of one file are equal."""
    if key == "data" and isinstance(value, list):
        return [_located(key, part, directory) for part in value]
    if key == "data" and isinstance(value, dict):
        return value | {"path": _located(key, value.get("path"), directory)}
    is_path = key in ("model", "teacher", "data") or (key == "recipe" and ".toml" in str(value))
    if not is_path or not isinstance(value, str):
        return value
    return _absolute(value, directory)
