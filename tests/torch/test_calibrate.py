"""Calibration: what it fits, it fits better than before; what is exact already stays exact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from tests.tiny_models import SPECS, lazy_weights

torch = pytest.importorskip("torch")

from supra_core.conversion.convert import ConversionRequest, convert  # noqa: E402
from supra_core.conversion.linearize import LinearizeOptions, linearize  # noqa: E402
from supra_core.errors import SpecError, SupraError  # noqa: E402
from supra_core.mixers.choices import FeatureMapName, OutputNormName  # noqa: E402
from supra_core.mixers.softmax import SoftmaxAttention  # noqa: E402
from supra_core.model.spec import ModelSpec  # noqa: E402
from supra_core.progress import silent  # noqa: E402
from supra_core.sources.source import open_source  # noqa: E402
from supra_core.text import read_text  # noqa: E402
from supra_torch.calibration.calibrate import _moments, _ridge, calibrate  # noqa: E402
from supra_torch.calibration.conversion import TextCalibration, calibrated_tensors  # noqa: E402
from supra_torch.model.model import SupraModel, build  # noqa: E402
from supra_torch.recipes.config import resolve  # noqa: E402
from supra_torch.uptrain.inputs import open_inputs  # noqa: E402
from supra_torch.uptrain.run import uptrain  # noqa: E402
from supra_torch.uptrain.step.batches import Batch  # noqa: E402
from supra_torch.uptrain.step.stages import transfer  # noqa: E402


def _pair(options: LinearizeOptions, spec: ModelSpec | None = None) -> tuple[SupraModel, Any]:
    spec = spec or SPECS["transformer"]
    weights = lazy_weights(spec)
    linear, tensors = linearize(spec, weights, options)
    return build(linear, tensors).train(), build(spec, weights).eval()


def _ids(rows: int, length: int, seed: int = 0) -> Any:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 50, (rows, length)))


@pytest.mark.parametrize(
    "options",
    [
        LinearizeOptions(preset="pure"),
        LinearizeOptions(preset="pure", output_norm="sum_sink"),
        LinearizeOptions(window=5, output_norm="sum_sink"),
        LinearizeOptions(window=5),
        LinearizeOptions(preset="paper"),
        LinearizeOptions(window=5, keep_softmax=(1,)),
    ],
)
def test_the_error_on_other_tokens_falls(options: LinearizeOptions) -> None:
    student, teacher = _pair(options)
    other = _ids(6, 60, seed=1)
    before = transfer(student, teacher, Batch(other))
    fits = calibrate(student, teacher, _ids(24, 61))
    assert len(fits) == sum(layer.mixer.converted for layer in student.spec.layers)
    assert all(fit.after < fit.before for fit in fits)
    assert transfer(student, teacher, Batch(other)) < 0.9 * before


def test_only_the_mixers_change() -> None:
    student, teacher = _pair(LinearizeOptions(preset="pure", output_norm="sum_sink"))
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    calibrate(student, teacher, _ids(8, 40))
    changed = {
        name.split("self_attn.")[-1]
        for name, tensor in student.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert changed <= {
        "q_feature.weight", "k_feature.weight", "log_slope", "log_sink", "gain", "o_proj.weight"
    }  # fmt: skip
    assert {"log_slope", "gain", "o_proj.weight"} <= changed


def test_heads_alone_leave_the_output_projections() -> None:
    student, teacher = _pair(LinearizeOptions(preset="pure"))
    before = student.model.layers[0].self_attn.o_proj.weight.clone()
    fits = calibrate(student, teacher, _ids(8, 40), outputs=False)
    assert torch.equal(student.model.layers[0].self_attn.o_proj.weight, before)
    assert all(fit.after < fit.before for fit in fits)


def test_a_window_over_everything_is_already_exact() -> None:
    student, teacher = _pair(LinearizeOptions(window=64))
    fits = calibrate(student, teacher, _ids(8, 60))
    # All tokens stand in the window: float32's rounding is all there is to fit.
    assert all(fit.after <= 1e-8 for fit in fits)


def test_a_sliding_teacher_is_followed() -> None:
    spec = SPECS["transformer"].with_mixers([SoftmaxAttention(7), SoftmaxAttention(20)])
    student, teacher = _pair(LinearizeOptions(preset="pure"), replace(spec, attention_bias="none"))
    fits = calibrate(student, teacher, _ids(16, 60))
    assert all(fit.after < fit.before for fit in fits)


def test_the_ridge_is_the_minimum() -> None:
    student, teacher = _pair(LinearizeOptions(preset="pure"))
    mixer, positions = student.model.layers[0].self_attn, teacher.positions(_ids(1, 40))
    x = torch.randn(6, 40, 24, generator=torch.Generator().manual_seed(0))
    y = torch.randn(6, 40, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        moments, _ = _moments(mixer, [x], [y], positions)
    start = mixer.o_proj.weight.detach().double()
    found = _ridge(moments, start, 0.1).requires_grad_()
    penalty = 0.1 * moments.own.diagonal().mean()
    loss = ((found @ moments.own - 2 * moments.cross) * found).sum()
    loss = loss + penalty * (found - start).square().sum()
    loss.backward()
    assert found.grad.abs().max() <= 1e-9 * moments.cross.abs().max()


def test_a_run_is_calibrated_once(tiny_transformer: Path, text_file: Path, tmp_path: Path) -> None:
    settings = {
        "tokens": "256", "sequence_length": "32", "batch_tokens": "64", "precision": "float32",
        "calibrate_tokens": "512",
    }  # fmt: skip
    config = resolve(
        config=None, model=str(tiny_transformer), recipe="pure", data=str(text_file),
        overrides=settings,
    )  # fmt: skip

    def interrupt(stage: str, done: int, total: int, **metrics: float) -> None:
        if stage == "calibrate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        uptrain(config, tmp_path / "interrupted", progress=interrupt)
    for name in ("run", "interrupted"):
        uptrain(config, tmp_path / name)
    ours, theirs = (open_source(tmp_path / name).tensors for name in ("run", "interrupted"))
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor.read(), theirs[name].read())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    (found,) = [record for record in records if "calibration" in record]
    assert found["calibration_tokens"] == 512
    assert all(fit["after"] < fit["before"] for fit in found["calibration"])


def test_a_file_is_calibrated_as_a_model_is(tiny_transformer: Path, text_file: Path) -> None:
    source = open_source(tiny_transformer)
    spec, tensors = linearize(source.spec, source.tensors, LinearizeOptions(window=8))
    ids = torch.from_numpy(source.tokenizer().encode(read_text(text_file)).ids[:600]).view(10, 60)
    found, fits = calibrated_tensors((source.spec, source.tensors), spec, tensors, ids, "float32")
    student = build(spec, tensors, dtype=torch.float32)
    teacher = build(source.spec, source.tensors, dtype=torch.float32)
    assert calibrate(student, teacher, ids) == fits
    for name, tensor in student.state_dict().items():
        expected = found[name] if name in found else tensors[name]
        np.testing.assert_array_equal(tensor.numpy(), expected.read())
    assert "model.layers.1.self_attn.o_proj.weight" in found
    assert "model.layers.1.self_attn.v_proj.weight" not in found


def test_a_calibrated_folder_still_holds_its_teacher(
    tiny_transformer: Path, text_file: Path, tmp_path: Path
) -> None:
    calibration = TextCalibration(read_text(text_file), 256)
    request = ConversionRequest(
        tiny_transformer, tmp_path / "out", options=LinearizeOptions(preset="pure"),
        calibrate=calibration, dtype="float32",
    )  # fmt: skip
    done = convert(request)
    assert done.calibrated
    config = resolve(
        config=None, model=str(tmp_path / "out"), recipe="pure", data=str(text_file), overrides={}
    )
    inputs = open_inputs(config)
    original = open_source(tiny_transformer)
    assert inputs.teacher is not None
    assert inputs.teacher[0] == replace(original.spec, provenance=inputs.teacher[0].provenance)
    for name, tensor in original.tensors.items():
        np.testing.assert_array_equal(inputs.teacher[1][name].read(), tensor.read())
    name = "model.layers.0.self_attn.o_proj.weight"
    changed = open_source(tmp_path / "out").tensors[name].read()
    assert (changed != original.tensors[name].read()).any()
    # A run that calibrates heads begins with the transformer's projections, others with these.
    np.testing.assert_array_equal(
        inputs.student_tensors[name].read(), original.tensors[name].read()
    )
    everything = open_inputs(config.model_copy(update={"calibrate": "all"}))
    np.testing.assert_array_equal(everything.student_tensors[name].read(), changed)


@pytest.mark.parametrize("tokens", [1, 10_000])
def test_too_little_text_is_named(tiny_transformer: Path, tokens: int) -> None:
    calibration = TextCalibration("a word or two", tokens)
    source = open_source(tiny_transformer)
    with pytest.raises(SupraError, match="too few for"):
        calibration(source, source.spec, source.tensors, silent)


@pytest.mark.parametrize("preset", ["paper", "pure", "windowed"])
@pytest.mark.parametrize("feature_map", get_args(FeatureMapName))
@pytest.mark.parametrize("output_norm", get_args(OutputNormName))
def test_every_choice_can_be_calibrated_and_trained(
    preset: Any, feature_map: Any, output_norm: Any
) -> None:
    """Wherever the rotation stands, whatever its width; impossible choices are refused."""
    for rope in (None, "before", "between", "after"):
        options = LinearizeOptions(
            preset=preset, feature_map=feature_map, output_norm=output_norm, rope=rope,
            window=5 if preset == "windowed" else None,
        )  # fmt: skip
        try:
            student, teacher = _pair(options)
        except SpecError:
            continue
        ids = _ids(4, 20)
        calibrate(student, teacher, ids)
        assert transfer(student, teacher, Batch(ids)).isfinite()
