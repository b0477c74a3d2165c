"""Nothing that a run reads back is damaged without a word, and what older versions wrote opens."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from supra_core.errors import SupraError  # noqa: E402
from supra_core.formats import checksums, safetensors  # noqa: E402
from supra_core.tensors import LazyTensor  # noqa: E402
from supra_torch.recipes.config import UptrainConfig, resolve  # noqa: E402
from supra_torch.run_folder import checkpoint  # noqa: E402
from supra_torch.run_folder.folder import CALIBRATED  # noqa: E402
from supra_torch.uptrain.run import uptrain  # noqa: E402
from tests.torch.uptraining import EVEN_STAGES, SETTINGS, logged_losses, weights_in  # noqa: E402


@pytest.fixture(scope="module")
def calibrated(tiny_transformer: Path, text_file: Path) -> UptrainConfig:
    """Six steps, of which the last three train adapters."""
    changes = {
        "calibrate": "heads", "calibrate_tokens": "256", "tokens": "384", "checkpoint_every": "2",
        "stages.1.kind": "distill", "stages.1.lora_rank": "2", "stages.1.new_learning_rate": "0",
    }  # fmt: skip
    config = resolve(
        config=None, model=str(tiny_transformer), recipe=None, data=str(text_file),
        overrides={**SETTINGS, **EVEN_STAGES, **changes},
    )  # fmt: skip
    return config.model_copy(update={"stages": config.stages[:2]})


def _stopped(config: UptrainConfig, run: Path, stage: str, step: int) -> Path:
    def interrupt(now: str, done: int, total: int, **metrics: float) -> None:
        if (now, done) == (stage, step):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        uptrain(config, run, progress=interrupt)
    return run


@pytest.fixture(scope="module")
def begun(calibrated: UptrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after five steps, inside the stage of adapters."""
    return _stopped(calibrated, tmp_path_factory.mktemp("begun") / "run", "distill", 2)


@pytest.fixture(scope="module")
def whole(calibrated: UptrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole") / "run"
    uptrain(calibrated, run)
    return run


@pytest.fixture
def run(begun: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


def _flip(file: Path) -> None:
    """One bit, of the last number."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _files(run: Path) -> list[Path]:
    newest = checkpoint.checkpoints(run)[-1]
    # state.json is read, and its fields looked at, before.
    unsummed = (checksums.NAME, checkpoint.STATE)
    files = [f for f in newest.rglob("*") if f.is_file() and f.name not in unsummed]
    return [f.relative_to(run) for f in (*files, *(run / "data" / "tokens").glob("*.bin"))]


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_named(
    calibrated: UptrainConfig, begun: Path, run: Path, every: bool
) -> None:
    """In a file of each folder, or in every file."""
    files = _files(begun)
    if not every:
        files = list({file.parent.name: file for file in files}.values())
    assert {file.parent.name for file in files} == {"model", "optimiser", "adapters", "tokens"}
    newest, before = checkpoint.checkpoints(run)[-1], checkpoint.checkpoints(run)[-2]
    for file in files:
        _flip(run / file)
        remedy = f"get it again; or delete {newest}, to resume from {before}"
        if file.parts[0] == "data":
            remedy = "restore it, or use another run folder"
        said = re.escape(f"{run / file} is not as it was written: {remedy}")
        with pytest.raises(SupraError, match=said):
            uptrain(calibrated, run)
        _flip(run / file)


def test_what_older_versions_wrote_goes_on_to_the_last_bit(
    calibrated: UptrainConfig, run: Path, whole: Path
) -> None:
    for file in run.rglob(checksums.NAME):
        file.unlink()
    index = run / "data" / "tokens" / "index.json"
    stated = json.loads(index.read_text())
    for shard in stated["shards"]:
        del shard["documents_sha256"]
    index.write_text(json.dumps(stated))
    uptrain(calibrated, run)
    assert logged_losses(run) == logged_losses(whole)
    ours, theirs = weights_in(run / "model"), weights_in(whole / "model")
    for name, expected in theirs.items():
        np.testing.assert_array_equal(ours[name], expected)


def _rewrite(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Other tensors in a file, as an older version's, which had no sums."""
    arrays = {name: np.array(tensor.read()) for name, tensor in safetensors.read_file(file).items()}
    change(arrays)
    stated = {k: v for k, v in safetensors.metadata(file).items() if k != "format"}
    safetensors.write_file(file, {n: LazyTensor.of(a) for n, a in arrays.items()}, stated)


def _nan(arrays: dict[str, Any]) -> None:
    next(iter(arrays.values())).reshape(-1)[0] = np.nan


def _int8(arrays: dict[str, Any]) -> None:
    name = next(iter(arrays))
    arrays[name] = arrays[name].astype(np.int8)


def _missing(arrays: dict[str, Any]) -> None:
    del arrays[next(iter(arrays))]


@pytest.mark.parametrize("kind", ["model", "optimiser", "adapters"])
@pytest.mark.parametrize("change", [_nan, _missing])
def test_a_checkpoint_without_sums_is_still_looked_at(
    calibrated: UptrainConfig, run: Path, kind: str, change: Callable[[dict[str, Any]], None]
) -> None:
    newest = checkpoint.checkpoints(run)[-1]
    for sums in newest.rglob(checksums.NAME):
        sums.unlink()
    (file,) = (newest / kind).glob("*.safetensors")
    _rewrite(file, change)
    said = "holds NaN or infinity" if change is _nan else ""
    with pytest.raises(
        SupraError, match=f"{said}.*; or delete {re.escape(str(newest))}, to resume"
    ):
        uptrain(calibrated, run)


@pytest.mark.parametrize(
    ("sums", "change"),
    [
        (True, None), (False, None), (False, _nan),
        pytest.param(False, _int8, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_what_calibrating_made_is_checked(
    calibrated: UptrainConfig, tmp_path: Path, change: Any, sums: bool
) -> None:
    run = _stopped(calibrated, tmp_path / "run", "transfer", 1)
    shutil.rmtree(run / "checkpoints")
    if sums:
        _flip(run / CALIBRATED)
    elif change is None:
        (run / checksums.NAME).unlink()
        uptrain(calibrated, run)
        return
    else:
        (run / checksums.NAME).unlink()
        _rewrite(run / CALIBRATED, change)
    said = f"{re.escape(str(run / CALIBRATED))}.*: delete it, to calibrate again"
    with pytest.raises(SupraError, match=said):
        uptrain(calibrated, run)
    (run / CALIBRATED).unlink()
    uptrain(calibrated, run)


_ODD: tuple[Any, ...] = (None, True, -1, 1.5, "5", [], {}, [[]], 2**70)


def test_state_json_of_any_other_kind_is_one_sentence(run: Path) -> None:
    newest = checkpoint.checkpoints(run)[-1]
    whole = json.loads((newest / "state.json").read_text())
    assert checkpoint.read_place(newest).step == 5
    cases = [{**whole, name: odd} for name in whole if name != "perplexity" for odd in _ODD]
    cases += [{**whole, "perplexity": odd} for odd in ("1", [], True)]
    cases += [{**whole, "unknown": 1}, {**whole, "step": 4}]
    for case in cases:
        (newest / "state.json").write_text(json.dumps(case))
        with pytest.raises(
            SupraError, match=r"state\.json: field .*; or delete .*, to resume from"
        ):
            checkpoint.read_place(newest)
    (newest / "state.json").write_text(json.dumps(whole | {"perplexity": float("nan")}))
    checkpoint.read_place(newest)


@pytest.mark.parametrize("change", [{"stage": 9}, {"stage": 0}, {"stage_step": 4}])
def test_a_place_where_the_run_is_never(
    calibrated: UptrainConfig, run: Path, change: dict[str, int]
) -> None:
    newest = checkpoint.checkpoints(run)[-1]
    (newest / checksums.NAME).unlink()
    whole = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps(whole | change))
    with pytest.raises(SupraError, match=r"state\.json states step . of stage .*; or delete"):
        uptrain(calibrated, run)


def test_odd_lines_of_the_log_are_one_sentence(calibrated: UptrainConfig, run: Path) -> None:
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines()
    at = next(number for number, line in enumerate(lines) if '"loss"' in line)
    step = json.loads(lines[at])
    odd = [json.dumps(value) for value in (5, None, [], "x", {}, {"calibration": 1, "step": "1"})]
    odd += [
        json.dumps({**step, name: value})
        for name in ("step", "loss", "gradient_norm")
        for value in ("1", [], {}, True)
    ]
    odd += [json.dumps({k: v for k, v in step.items() if k != "gradient_norm"}), "{", "\x00"]
    for line in odd:
        log.write_text("\n".join([*lines[:at], line, *lines[at + 1 :]]) + "\n")
        with pytest.raises(
            SupraError, match=rf"metrics\.jsonl, line {at + 1} is not a line of an up"
        ):
            uptrain(calibrated, run)
    # One that a kill cut off.
    log.write_text("\n".join(lines) + '\n{"step": 6, "lo')
    uptrain(calibrated, run)


def test_odd_fields_of_run_json_are_one_sentence(calibrated: UptrainConfig, run: Path) -> None:
    file = run / "run.json"
    whole = json.loads(file.read_text())
    cases = [{**whole, "config": odd} for odd in _ODD]
    cases += [
        {**whole, "config": {**whole["config"], name: odd}}
        for name in whole["config"]
        if name not in calibrated.FREE
        for odd in (*_ODD, [{"path": 5}], {"path": []}, "\x00")
        if odd != whole["config"][name]
    ]
    for case in cases:
        file.write_text(json.dumps(case))
        with pytest.raises(SupraError):
            uptrain(calibrated, run)
