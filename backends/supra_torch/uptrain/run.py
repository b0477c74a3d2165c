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
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from supra_core import artifact
from supra_core.errors import SupraError
from supra_core.formats.atomic import atomic_file
from supra_core.layout import tensor_shapes
from supra_core.linearize import LinearizeOptions, linearize
from supra_core.progress import Progress, silent
from supra_core.sources import Source, open_source
from supra_core.spec import Folded, LinearAttention, ModelSpec, SoftmaxAttention
from supra_core.tensors import LazyTensor, TensorSource
from supra_core.text import load_tokenizer
from supra_torch.model import SupraModel, build, lazy_tensors
from supra_torch.uptrain import checkpoint
from supra_torch.uptrain.checkpoint import Place
from supra_torch.uptrain.config import UptrainConfig
from supra_torch.uptrain.data import Sequences, text_files, tokenised
from supra_torch.uptrain.stages import distill, optimiser_for, trained_parameters, transfer

_STAGES = {"transfer": transfer, "distill": distill}


def uptrain(config: UptrainConfig, run: Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Train, or go on training, and write ``run``/model; returns a summary.

    Raises SupraError when ``run`` belongs to another config, the inputs do not fit, or the loss
    is no longer finite (the last checkpoint stays). On Ctrl-C a checkpoint is written first.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolved_precision(config.precision, device)
    _refuse_another_run(run, config)
    summary_file = run / "summary.json"
    if summary_file.is_file() and (run / "model").is_dir():
        summary: dict[str, Any] = json.loads(summary_file.read_text("utf-8"))
        return {**summary, "already_finished": True}
    inputs = _open_inputs(config)
    assets = inputs.student_assets
    tokenizer = load_tokenizer(assets, config.model)
    text_files(Path(config.data))
    _claim(run, config, precision)
    separator = inputs.teacher_spec.eos_token_id[0] if inputs.teacher_spec.eos_token_id else None
    tokens = tokenised(Path(config.data), tokenizer, separator, run / "data", progress)
    session = _Session(
        config=config,
        run=run,
        device=device,
        precision=precision,
        sequences=Sequences(tokens, config.sequence_length, config.seed),
        teacher=_teacher(inputs, precision, device),
        assets=assets,
        progress=progress,
    )
    place, student, spec = _starting_point(run, inputs, device)
    _trim_metrics(run / "metrics.jsonl", place)
    summary = _train(session, place, student, spec)
    with atomic_file(summary_file) as beside:
        beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return {**summary, "already_finished": False}


def resolved_precision(precision: str, device: torch.device) -> str:
    """``auto`` is bf16 where the hardware multiplies it natively, else float32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "float32"
    # Without these instructions bf16 products are emulated and slower than float32.
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or _has_amx() else "float32"


# --- what a run works on ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    student_spec: ModelSpec
    student_tensors: TensorSource
    student_assets: dict[str, bytes]
    teacher_spec: ModelSpec
    teacher_tensors: TensorSource


@dataclass(frozen=True)
class _Session:
    """Everything that does not change while a run goes on."""

    config: UptrainConfig
    run: Path
    device: torch.device
    precision: str
    sequences: Sequences
    teacher: SupraModel
    assets: Mapping[str, bytes]
    progress: Progress

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"
        )


def _refuse_another_run(run: Path, config: UptrainConfig) -> None:
    """Raise SupraError when ``run`` is no run, or one that trained with other settings."""
    if run.exists() and not run.is_dir():
        raise SupraError(f"{run} is a file: name a folder for the run")
    file = run / "run.json"
    if not file.is_file():
        if run.is_dir() and any(run.iterdir()):
            raise SupraError(f"{run} exists and is no uptraining run: name another run folder")
        return
    before, stated = json.loads(file.read_text("utf-8")), config.model_dump(mode="json")
    different = [key for key in stated if before["config"].get(key) != stated[key]]
    if different and (run / "metrics.jsonl").is_file():
        raise SupraError(
            f"{run} was begun with another {different[0]}: resume with the same settings, "
            "or name another run folder"
        )
    if different:
        # It never took a step: a corrected setting may begin it again. Only what a run makes
        # is removed, never the folder.
        file.unlink()
        shutil.rmtree(run / "data", ignore_errors=True)


def _claim(run: Path, config: UptrainConfig, precision: str) -> None:
    """Write run.json, unless the run has one already."""
    file = run / "run.json"
    if file.is_file():
        return
    run.mkdir(parents=True, exist_ok=True)
    packages = ("supra-lm", "torch", "numpy", "safetensors", "tokenizers")
    record = {
        "config": config.model_dump(mode="json"),
        "teacher": config.teacher or config.model,
        "precision": precision,
        "versions": {"python": platform.python_version()} | {p: _version(p) for p in packages},
        "machine": platform.machine(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    with atomic_file(file) as beside:
        beside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _open_inputs(config: UptrainConfig) -> _Inputs:
    model = open_source(config.model)
    if model.spec.is_transformer:
        options = LinearizeOptions(**config.linearize.model_dump(), seed=config.seed)
        spec, tensors = linearize(model.spec, model.tensors, options)
        return _Inputs(spec, tensors, model.assets(), model.spec, model.tensors)
    if config.teacher is not None:
        teacher = open_source(config.teacher)
        _check_teacher(config, model.spec, teacher)
        return _Inputs(model.spec, model.tensors, model.assets(), teacher.spec, teacher.tensors)
    spec, tensors = _original(config, model)
    return _Inputs(model.spec, model.tensors, model.assets(), spec, tensors)


def _check_teacher(config: UptrainConfig, student: ModelSpec, teacher: Source) -> None:
    if not teacher.spec.is_transformer:
        raise SupraError(f"{config.teacher} is no transformer: name the original as teacher")
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        if getattr(teacher.spec, name) != getattr(student, name):
            raise SupraError(
                f"{config.teacher} has another {name} than {config.model}: name the transformer "
                "it was converted from as teacher"
            )


def _original(config: UptrainConfig, model: Source) -> tuple[ModelSpec, TensorSource]:
    """The transformer inside a freshly converted model, whose own weights are untouched."""
    mixers = [layer.mixer for layer in model.spec.layers]
    folded = any(
        isinstance(mixer, LinearAttention) and isinstance(mixer.feature_map.projection, Folded)
        for mixer in mixers
    )
    if folded or model.spec.provenance.trained_tokens or not model.spec.provenance.recipe:
        raise SupraError(
            f"{config.model} no longer holds the transformer to learn from: name it with "
            "--set teacher=PATH"
        )
    spec = model.spec.with_mixers(
        [m if isinstance(m, SoftmaxAttention) else SoftmaxAttention() for m in mixers]
    )
    return spec, {name: model.tensors[name] for name in tensor_shapes(spec)}


def _teacher(inputs: _Inputs, precision: str, device: torch.device) -> SupraModel:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    teacher = build(inputs.teacher_spec, inputs.teacher_tensors, dtype=dtype)
    return teacher.to(device).eval().requires_grad_(False)


def _starting_point(
    run: Path, inputs: _Inputs, device: torch.device
) -> tuple[Place, SupraModel, ModelSpec]:
    """The newest checkpoint, or the linearized model."""
    found = checkpoint.checkpoints(run)
    spec, place = inputs.student_spec, Place()
    tensors: Mapping[str, LazyTensor] = inputs.student_tensors
    if found:
        place = checkpoint.read_place(found[-1])
        tensors = artifact.read(found[-1] / "model").tensors
    student = build(spec, tensors, dtype=torch.float32).to(device).train()
    return place, student, spec


# --- training ---------------------------------------------------------------------------------


def _train(session: _Session, place: Place, student: SupraModel, spec: ModelSpec) -> dict[str, Any]:
    config, metrics = session.config, session.run / "metrics.jsonl"
    held_out = _perplexity(session, session.teacher)
    if place.step == 0:
        _write(metrics, {"evaluation": "held_out", "teacher_perplexity": held_out, "step": 0})
        _evaluate(session, place, student)
    steps = config.stage_steps()
    while place.stage < len(steps):
        place = _run_stage(session, place, student, spec, steps[place.stage])
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
) -> Place:
    """Train from ``place`` to the end of its stage; returns the beginning of the next."""
    config, stage = session.config, session.config.stages[place.stage]
    optimiser = optimiser_for(student, stage)
    names = {parameter: name for name, parameter in student.named_parameters()}
    if place.stage_step:
        checkpoint.load_optimiser(checkpoint.checkpoints(session.run)[-1], optimiser, names)
    saved = place

    def save() -> None:
        trained = _trained(spec, place)
        checkpoint.save(session.run, place, student, trained, session.assets, optimiser, names)

    try:
        while place.stage_step < steps:
            record = _step(session, place, student, optimiser, steps)
            place = replace(
                place,
                stage_step=place.stage_step + 1,
                step=place.step + 1,
                tokens=place.tokens + record["step_tokens"],
            )
            _write(session.run / "metrics.jsonl", {**record, "tokens": place.tokens})
            session.progress(
                stage.kind, place.stage_step, steps,
                loss=record["loss"], tokens_per_second=record["tokens_per_second"],
            )  # fmt: skip
            if config.evaluate_every and place.step % config.evaluate_every == 0:
                _evaluate(session, place, student)
            if place.step % config.checkpoint_every == 0 and place.stage_step < steps:
                save()
                saved = place
    except KeyboardInterrupt:
        if place != saved and place.stage_step:
            save()
        raise
    _evaluate(session, place, student)
    place = replace(place, stage=place.stage + 1, stage_step=0)
    save()
    return place


def _step(
    session: _Session,
    place: Place,
    student: SupraModel,
    optimiser: torch.optim.Optimizer,
    steps: int,
) -> dict[str, Any]:
    """One optimiser step; returns its line of metrics."""
    stage, began = session.config.stages[place.stage], time.perf_counter()
    batch = session.sequences.batch(place.step, session.config.batch_size)
    ids = torch.from_numpy(batch).to(session.device)
    factor = learning_rate_factor(place.stage_step, steps, stage.warmup, stage.final_learning_rate)
    for group in optimiser.param_groups:
        group["lr"] = group["peak"] * factor
    with session.autocast():
        loss = _STAGES[stage.kind](student, session.teacher, ids)
    norm = nn.utils.clip_grad_norm_(list(trained_parameters(optimiser)), stage.clip).item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        raise SupraError(
            f"{session.run}: the loss is no longer finite at step {place.step + 1} (loss {loss}, "
            f"gradient norm {norm}): lower stages.{place.stage}.learning_rate; the last "
            "checkpoint is kept"
        )
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    return {
        "stage": stage.kind,
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


def _evaluate(session: _Session, place: Place, student: SupraModel) -> None:
    perplexity = _perplexity(session, student)
    record = {"evaluation": "held_out", "step": place.step, "perplexity": perplexity}
    _write(session.run / "metrics.jsonl", {**record, "tokens": place.tokens})
    session.progress("evaluate", 1, 1, perplexity=perplexity)


@torch.inference_mode()
def _perplexity(session: _Session, model: SupraModel) -> float:
    """exp of the mean loss over the held-out sequences."""
    total, count = 0.0, 0
    for row in session.sequences.held_out():
        ids = torch.from_numpy(row)[None].to(session.device)
        with session.autocast():
            hidden, _ = model.hidden(ids)
            logits = F.linear(hidden[0, :-1], model.head_weight.to(hidden.dtype))
        total += F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
        count += ids.numel() - 1
    # Far from a language model the mean loss can exceed what exp can hold.
    return math.exp(min(total / count, 700.0))


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


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _has_amx() -> bool:
    return bool(torch.cpu._is_amx_tile_supported())
