"""One uptraining run in one process: from a config to a finished model, resumable at any moment.

``RUN/run.json`` resolved config and versions; ``metrics.jsonl`` one object a step;
``data/`` the tokenised text; ``checkpoints/``; ``model/`` the finished artifact.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from supra_core import artifact
from supra_core.errors import SupraError
from supra_core.formats.atomic import atomic_file
from supra_core.formats.jsonfile import read_object
from supra_core.linearize import LinearizeOptions, linear_spec, linearize
from supra_core.progress import Progress, silent
from supra_core.sources import Source, open_source
from supra_core.spec import ModelSpec
from supra_core.teacher import holds_original, original, original_spec
from supra_core.tensors import LazyTensor, TensorSource
from supra_core.text import load_tokenizer
from supra_torch.calibrate import calibrate
from supra_torch.model import SupraModel, build, lazy_tensors
from supra_torch.uptrain import checkpoint, lora
from supra_torch.uptrain.capture import CapturedGradients, Gradients
from supra_torch.uptrain.checkpoint import Place
from supra_torch.uptrain.compilation import compiled_layers, compiles, eagerly
from supra_torch.uptrain.config import Stage, UptrainConfig
from supra_torch.uptrain.data import Mixture, mixture, refuse_too_little, refuse_unfit, stored
from supra_torch.uptrain.guard import LossGuard
from supra_torch.uptrain.host_memory import keep_freed_memory
from supra_torch.uptrain.interrupts import deferred_interrupts
from supra_torch.uptrain.stages import gradients, next_token_loss, optimiser_for
from supra_torch.uptrain.step import autocast, resolved_precision, trained_parameters, training_step


def uptrain(
    config: UptrainConfig,
    run: Path,
    *,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train, or go on training, and write ``run``/model; returns a summary.

    ``say`` is told, in a line, what progress does not show.
    Raises SupraError when ``run`` belongs to another config, the inputs do not fit, or the loss
    is no longer finite (the last checkpoint stays). On Ctrl-C a checkpoint is written first.
    The process keeps the memory that it frees (:func:`keep_freed_memory`).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolved_precision(config.precision, device)
    _refuse_another_run(run, config)
    summary_file = run / "summary.json"
    if summary_file.is_file() and (run / "model").is_dir():
        return {**read_object(summary_file), "already_finished": True}
    inputs = open_inputs(config)
    _refuse_another_recipe(config, inputs.student_spec)
    assets = inputs.student_assets
    load_tokenizer(assets, config.model)
    refuse_unfit(config.data_parts, assets)
    existed = run.is_dir()
    _claim(run, config, precision)
    begun = (run / "metrics.jsonl").is_file()
    try:
        data = _data(config, run, inputs, progress, begun)
    except SupraError:
        if not begun:
            _unclaim(run, existed)
        raise
    session = _Session(
        config=config,
        run=run,
        device=device,
        precision=precision,
        data=data,
        teacher=inputs.teacher and frozen_teacher(*inputs.teacher, precision, device),
        assets=assets,
        progress=progress,
        say=say,
    )
    keep_freed_memory()
    place, student, spec = _starting_point(config, run, inputs, device)
    _trim_metrics(run / "metrics.jsonl", place)
    if place.step:
        say(f"{run} goes on after step {place.step} of {sum(config.stage_steps())}")
    else:
        _calibrate(session, student, spec)
    summary = _train(session, place, student, spec)
    with atomic_file(summary_file) as beside:
        beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return {**summary, "already_finished": False}


# --- what a run works on ----------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """The student as it begins, and the transformer to learn from where there is one."""

    student_spec: ModelSpec
    student_tensors: TensorSource
    student_assets: dict[str, bytes]
    teacher: tuple[ModelSpec, TensorSource] | None


@dataclass(frozen=True)
class _Session:
    """Everything that does not change while a run goes on."""

    config: UptrainConfig
    run: Path
    device: torch.device
    precision: str
    data: Mixture
    teacher: SupraModel | None
    assets: Mapping[str, bytes]
    progress: Progress
    say: Callable[[str], None]

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.precision)

    @property
    def compiles(self) -> bool:
        """Whether steps are compiled, and on a GPU captured."""
        return compiles(self.config.compile, self.device)

    def compiled(self, stage: Stage, student: SupraModel) -> AbstractContextManager[object]:
        """Inside, the stage's steps are compiled if the run compiles."""
        if not self.compiles:
            return eagerly(self.device)
        return compiled_layers(stage.kind, student, self.teacher)

    def gradients(
        self, stage: Stage, student: SupraModel, optimiser: torch.optim.Optimizer
    ) -> Gradients:
        """What a step of the stage computes of a batch."""

        def compute(ids: Tensor) -> Tensor:
            with self.autocast():
                return gradients(stage.kind, student, self.teacher, ids)

        if not self.compiles or self.device.type != "cuda":
            return compute
        return CapturedGradients(compute, list(trained_parameters(optimiser)), self.say)


def _refuse_another_run(run: Path, config: UptrainConfig) -> None:
    """Raise SupraError when ``run`` is no run, or one that trained with other settings."""
    if run.exists() and not run.is_dir():
        raise SupraError(f"{run} is a file: name a folder for the run")
    file = run / "run.json"
    if not file.is_file():
        if run.is_dir() and any(run.iterdir()):
            raise SupraError(f"{run} exists and is no uptraining run: name another run folder")
        return
    before, stated = read_object(file).get("config"), config.model_dump(mode="json")
    if not isinstance(before, dict):
        raise SupraError(f"{file} has no config: name another run folder")
    # A setting that is younger than the run had its default then.
    defaults = {key: field.default for key, field in UptrainConfig.model_fields.items()}
    different = [key for key in stated if before.get(key, defaults[key]) != stated[key]]
    if different and (run / "metrics.jsonl").is_file():
        key = different[0]
        values = (before.get(key, defaults[key]), stated[key])
        plain = all(isinstance(value, str | int | float) for value in values)
        said = f" ({key} was {values[0]} and is {values[1]} now)" if plain else ""
        raise SupraError(
            f"{run} was begun with another setting of {key}{said}: resume with the same settings, "
            "or name another run folder"
        )
    if different:
        # It never took a step: a corrected setting may begin it again.
        _unclaim(run, existed=True)


def _unclaim(run: Path, existed: bool) -> None:
    """Remove what a run that never took a step has made; only an ``existed`` folder stays."""
    (run / "run.json").unlink()
    shutil.rmtree(run / "data", ignore_errors=True)
    if not existed:
        run.rmdir()


def _claim(run: Path, config: UptrainConfig, precision: str) -> None:
    """Write run.json, unless the run has one already."""
    file = run / "run.json"
    if file.is_file():
        return
    run.mkdir(parents=True, exist_ok=True)
    packages = ("supra-lm", "torch", "numpy", "safetensors", "tokenizers")
    record = {
        "config": config.model_dump(mode="json"),
        "teacher": _absolute(config.teacher or config.model),
        "precision": precision,
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "machine": platform.machine(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with atomic_file(file) as beside:
        beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _data(
    config: UptrainConfig, run: Path, inputs: Inputs, progress: Progress, begun: bool
) -> Mixture:
    """The run's text in tokens; SupraError when it is not enough, or has changed."""
    parts = config.data_parts
    tokens = stored(
        parts, inputs.student_assets, inputs.student_spec, run / "data", progress, begun=begun
    )
    data = mixture(parts, tokens, config.sequence_length, config.seed)
    refuse_too_little(data, parts, config.tokens, config.epochs)
    return data


def open_inputs(config: UptrainConfig) -> Inputs:
    """What ``config`` names; a transformer is linearized. Raises SupraError without a teacher."""
    model = open_source(config.model)
    teacher = _teacher_of(config, model)
    if model.spec.is_transformer:
        spec, tensors = linearize(model.spec, model.tensors, _linearize_options(config))
        return Inputs(spec, tensors, model.assets(), teacher)
    begins: TensorSource = model.tensors
    if config.calibrate == "heads" and holds_original(model):
        # Fitted output projections learn more slowly than the transformer's own.
        begins = {**begins, **model.originals}
    return Inputs(model.spec, begins, model.assets(), teacher)


def _linearize_options(config: UptrainConfig) -> LinearizeOptions:
    return LinearizeOptions(**config.linearize.model_dump(), seed=config.seed)


def _refuse_another_recipe(config: UptrainConfig, spec: ModelSpec) -> None:
    """Raise SupraError when the recipe describes other mixers than the student has.

    Only one that was converted before can have others.
    """
    made, preset = spec.provenance.recipe, config.linearize.preset
    if not made:
        return
    if made != preset:
        raise SupraError(
            f"{config.model} was converted by recipe {made}, and {config.recipe} begins with "
            f"{preset}: uptrain it with --recipe {made}, or name the transformer as the model"
        )
    # A conversion may have chosen otherwise than its preset: only what is stated must agree.
    if not config.linearize.model_dump(exclude_defaults=True, exclude={"preset"}):
        return
    expected = linear_spec(original_spec(spec), _linearize_options(config))
    if [layer.mixer for layer in expected.layers] != [layer.mixer for layer in spec.layers]:
        raise SupraError(
            f"{config.model} was converted to other mixers than {config.recipe} and the settings "
            "of linearize describe: leave those out, or name the transformer as the model"
        )


def _teacher_of(config: UptrainConfig, model: Source) -> tuple[ModelSpec, TensorSource] | None:
    """The transformer to learn from: named, the model itself, inside it, or not needed."""
    if config.teacher is not None:
        teacher = open_source(config.teacher)
        _check_teacher(config, model.spec, teacher)
        return teacher.spec, teacher.tensors
    if model.spec.is_transformer:
        return model.spec, model.tensors
    if holds_original(model):
        return original(model)
    if config.needs_teacher:
        raise SupraError(
            f"{config.model} no longer holds the transformer to learn from: name it with "
            "--set teacher=PATH"
        )
    return None


def _check_teacher(config: UptrainConfig, student: ModelSpec, teacher: Source) -> None:
    if not teacher.spec.is_transformer:
        raise SupraError(f"{config.teacher} is no transformer: name the original as teacher")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if getattr(teacher.spec, name) != getattr(student, name):
            raise SupraError(
                f"{config.teacher} has another {name} than {config.model}: name the transformer "
                "it was converted from as teacher"
            )


def frozen_teacher(
    spec: ModelSpec, tensors: TensorSource, precision: str, device: torch.device
) -> SupraModel:
    """The transformer to learn from, in the type its products are taken in."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return build(spec, tensors, dtype=dtype).to(device).eval().requires_grad_(False)


def _starting_point(
    config: UptrainConfig, run: Path, inputs: Inputs, device: torch.device
) -> tuple[Place, SupraModel, ModelSpec]:
    """The newest checkpoint, or the linearized model."""
    found = checkpoint.checkpoints(run)
    spec, place = inputs.student_spec, Place()
    tensors: Mapping[str, LazyTensor] = inputs.student_tensors
    if found:
        place = checkpoint.read_place(found[-1])
        tensors = artifact.read(found[-1] / "model").tensors
    student = build(spec, tensors, dtype=torch.float32).to(device).train()
    student.activation_checkpointing = config.activation_checkpointing
    return place, student, spec


def _calibrate(session: _Session, student: SupraModel, spec: ModelSpec) -> None:
    """Fit a freshly converted student in closed form, and write how well it went."""
    wanted, tokens = session.config.calibrate, session.config.calibrate_tokens
    before = spec.provenance.trained_tokens or spec.provenance.calibration_tokens
    if session.teacher is None or wanted == "none" or not tokens or before:
        return
    rows = max(2, tokens // session.config.sequence_length)
    began = time.perf_counter()
    ids = torch.from_numpy(session.data.batch(0, rows)).to(session.device)
    with session.autocast():
        fits = calibrate(
            student, session.teacher, ids, outputs=wanted == "all", progress=session.progress
        )
    record = {
        "calibration": [asdict(fit) for fit in fits],
        "step": 0,
        "calibration_tokens": ids.numel(),
        "seconds": time.perf_counter() - began,
    }
    _write(session.run / "metrics.jsonl", record)


# --- training ---------------------------------------------------------------------------------


def _train(session: _Session, place: Place, student: SupraModel, spec: ModelSpec) -> dict[str, Any]:
    config, metrics = session.config, session.run / "metrics.jsonl"
    held_out = None if session.teacher is None else _perplexity(session, session.teacher)
    if not config.needs_teacher:
        session = replace(session, teacher=None)
    if place.step == 0:
        _write(metrics, {"evaluation": "held_out", "teacher_perplexity": held_out, "step": 0})
        _evaluate(session, place, student)
    steps, final = config.stage_steps(), None
    while place.stage < len(steps):
        with session.compiled(config.stages[place.stage], student):
            place, final = _run_stage(session, place, student, spec, steps[place.stage])
    if final is None:
        final = _perplexity(session, student)
    finished = _trained(spec, place)
    artifact.write(
        session.run / "model",
        finished,
        lazy_tensors(student),
        session.assets,
        force=True,
        dtype="float32",
        progress=lambda done, total: session.progress("write", done, total),
    )
    return {
        "run": str(session.run),
        "model": str(session.run / "model"),
        "tokens": place.tokens,
        "steps": place.step,
        "precision": session.precision,
        "held_out_perplexity": final,
        "teacher_held_out_perplexity": held_out,
    }


def _run_stage(
    session: _Session, place: Place, student: SupraModel, spec: ModelSpec, steps: int
) -> tuple[Place, float]:
    """Train from ``place`` to the end of its stage: the next one's beginning, and perplexity."""
    config, stage = session.config, session.config.stages[place.stage]
    if stage.lora_rank is not None:
        lora.attach(student, stage.lora_rank, stage.lora_alpha, config.seed)
    optimiser = optimiser_for(student, stage)
    names = {parameter: name for name, parameter in student.named_parameters()}
    if place.stage_step:
        newest = checkpoint.checkpoints(session.run)[-1]
        if stage.lora_rank is not None:
            lora.load_adapters(student, checkpoint.read_adapters(newest))
        checkpoint.load_optimiser(newest, optimiser, names)
    compute = session.gradients(stage, student, optimiser)
    guard = LossGuard(config.divergence, _losses(session.run / "metrics.jsonl", place))
    saved = place

    def save(optimiser: torch.optim.Optimizer | None) -> None:
        trained = _trained(spec, place)
        checkpoint.save(session.run, place, student, trained, session.assets, optimiser, names)

    try:
        while place.stage_step < steps:
            # Weights, place and metrics move together, or a checkpoint would mix two steps.
            with deferred_interrupts(_stopping(session)):
                record = _step(session, place, compute, optimiser, steps)
                place = replace(
                    place,
                    stage_step=place.stage_step + 1,
                    step=place.step + 1,
                    tokens=place.tokens + record["step_tokens"],
                )
                _write(session.run / "metrics.jsonl", {**record, "tokens": place.tokens})
            guard.add(record["loss"])
            if guard.diverged:
                raise _diverged(session, place, guard)
            session.progress(
                stage.kind, place.stage_step, steps,
                loss=record["loss"], tokens_per_second=record["tokens_per_second"],
            )  # fmt: skip
            if place.stage_step == steps:
                break
            if config.evaluate_every and place.step % config.evaluate_every == 0:
                _evaluate(session, place, student)
            if place.step % config.checkpoint_every == 0 and guard.healthy:
                save(optimiser)
                saved = place
        perplexity = _evaluate(session, place, student)
    except KeyboardInterrupt:
        if place != saved and place.stage_step:
            save(optimiser)
        raise
    lora.merge(student)
    place = replace(place, stage=place.stage + 1, stage_step=0)
    save(None)
    return place, perplexity


def _stopping(session: _Session) -> Callable[[], None]:
    return lambda: session.say("stopping after this step, with a checkpoint of it")


def _losses(metrics: Path, place: Place) -> list[float]:
    """The losses of the stage under way, as they were logged."""
    if not place.stage_step:
        return []
    records = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    first = place.step - place.stage_step
    return [record["loss"] for record in records if "loss" in record and record["step"] > first]


def _diverged(session: _Session, place: Place, guard: LossGuard) -> SupraError:
    return SupraError(
        f"{session.run}: the loss diverges at step {place.step} (mean of the last steps "
        f"{guard.mean:.4g}, before {guard.lowest:.4g}): lower stages.{place.stage}.learning_rate "
        "in a new run; the last good checkpoint is kept"
    )


def _step(
    session: _Session,
    place: Place,
    compute: Gradients,
    optimiser: torch.optim.Optimizer,
    steps: int,
) -> dict[str, Any]:
    """One optimiser step; returns its line of metrics."""
    stage, began = session.config.stages[place.stage], time.perf_counter()
    rows, _ = session.config.batch_shape(stage)
    batch = session.data.batch(place.tokens, rows, stage.cut)
    ids = torch.from_numpy(batch).to(session.device)
    factor = learning_rate_factor(place.stage_step, steps, stage.warmup, stage.final_learning_rate)
    try:
        loss, norm = training_step(
            lambda: compute(ids), optimiser, learning_rate_factor=factor, clip=stage.clip
        )
    except FloatingPointError as error:
        raise SupraError(
            f"{session.run}: the loss is no longer finite at step {place.step + 1} ({error}): "
            f"lower stages.{place.stage}.learning_rate; the last checkpoint is kept"
        ) from None
    seconds = time.perf_counter() - began
    return {
        "stage": stage.kind,
        "stage_index": place.stage,
        "step": place.step + 1,
        "loss": loss,
        "gradient_norm": norm,
        "learning_rate": stage.learning_rate * factor,
        "step_tokens": ids.numel(),
        "tokens_per_second": ids.numel() / seconds,
    }


def learning_rate_factor(step: int, steps: int, warmup: float, final: float) -> float:
    """Linear warmup over a share of the steps, then a cosine to ``final``; 0 <= step < steps."""
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1, steps - warm)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))


def _evaluate(session: _Session, place: Place, student: SupraModel) -> float:
    """The held-out perplexity, written to the metrics."""
    perplexity = _perplexity(session, student)
    record = {"evaluation": "held_out", "step": place.step, "perplexity": perplexity}
    _write(session.run / "metrics.jsonl", {**record, "tokens": place.tokens})
    session.progress("evaluate", 1, 1, perplexity=perplexity)
    return perplexity


@torch.inference_mode()
def _perplexity(session: _Session, model: SupraModel) -> float:
    """exp of the mean loss over the held-out sequences, which are all of one length."""
    losses = []
    for row in session.data.held_out():
        ids = torch.from_numpy(row)[None].to(session.device)
        with session.autocast(), eagerly(session.device):
            losses.append(next_token_loss(model, ids).item())
    # Far from a language model the mean loss can exceed what exp can hold.
    return math.exp(min(sum(losses) / len(losses), 700.0))


def _trained(spec: ModelSpec, place: Place) -> ModelSpec:
    before = spec.provenance
    tokens = before.trained_tokens + place.tokens
    return replace(spec, provenance=replace(before, trained_tokens=tokens))


def _write(file: Path, record: Mapping[str, Any]) -> None:
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")


def _trim_metrics(file: Path, place: Place) -> None:
    """Drop what was logged after the checkpoint that the run goes on from."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text("utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # A line cut off by a kill.
        if place.step and record["step"] <= place.step:
            kept.append(line + "\n")
    with atomic_file(file) as beside:
        beside.write_text("".join(kept), encoding="utf-8")


def _absolute(model: str) -> str:
    """The model's path from wherever it is looked for; a hub id as it is."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
