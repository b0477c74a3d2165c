"""A process that trains one model, a step at a time when asked: its memory is its own."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from supra_core.errors import SupraError
from supra_core.sources.source import open_source
from supra_torch.distributed.processes import Processes
from supra_torch.distributed.sharding import frozen_teacher, trained_student
from supra_torch.precision import autocast
from supra_torch.recipes.config import UptrainConfig
from supra_torch.uptrain.inputs import open_inputs
from supra_torch.uptrain.memory import keep_freed_memory, peak_memory, reset_peak
from supra_torch.uptrain.step.batches import Batch
from supra_torch.uptrain.step.capture import CapturedGradients, Gradients
from supra_torch.uptrain.step.compilation import compile_layers, compiles
from supra_torch.uptrain.step.operations import flops_per_token, multiplied_weights
from supra_torch.uptrain.step.stages import gradients, optimiser_for
from supra_torch.uptrain.step.step import adamw, trained_parameters, training_step


@dataclass(frozen=True)
class Training:
    """What a process trains: ours, or with ``original`` the transformer in transformers."""

    config: UptrainConfig
    original: bool
    precision: str
    threads: int


@dataclass(frozen=True)
class Summary:
    """``captured``: whether the steps were a CUDA graph; None where that was not tried."""

    peak_bytes: int
    flops_per_token: int
    captured: bool | None


def serve(training: Training, pipe: Connection) -> None:
    """Answer ``ready``, then each step's number with its seconds, then None with a Summary.

    A SupraError is answered with its message as a string, and ends the process.
    """
    torch.set_num_threads(training.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        accumulate, optimiser, vocabulary, flops = (_original if training.original else _ours)(
            training, device
        )
    except SupraError as error:
        pipe.send(str(error))
        return
    keep_freed_memory()
    config = training.config
    reset_peak(device)
    pipe.send("ready")
    while (number := pipe.recv()) is not None:
        shape = config.batch_shape(config.stages[0])
        batch = np.random.default_rng(number).integers(0, vocabulary, shape)
        began = time.perf_counter()
        ids = torch.from_numpy(batch).to(device)
        training_step(
            lambda ids=ids: accumulate([Batch(ids)]),  # type: ignore[misc]
            optimiser,
            learning_rate_factor=1.0,
            clip=config.stages[0].clip,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - began)
    captured = accumulate.succeeded if isinstance(accumulate, CapturedGradients) else None
    pipe.send(Summary(peak_memory(device), flops, captured))


def _ours(
    training: Training, device: torch.device
) -> tuple[Gradients, torch.optim.Optimizer, int, int]:
    config, stage = training.config, training.config.stages[0]
    inputs = open_inputs(config)
    one = Processes(0, 1, device)
    student = trained_student(config, stage, inputs.student_spec, inputs.student_tensors, one)
    teacher = None
    if config.needs_teacher:
        assert inputs.teacher is not None
        teacher = frozen_teacher(*inputs.teacher, training.precision, one)

    def compute(batches: Sequence[Batch]) -> Tensor:
        (batch,) = batches
        with autocast(device, training.precision):
            return gradients(stage.kind, student, teacher, batch, segment=config.segment_tokens)

    optimiser = optimiser_for(student, stage)
    accumulate: Gradients = compute
    if compiles(config.compile, device):
        compile_layers(stage.kind, student, teacher, segments=config.in_segments(stage))
        if device.type == "cuda":
            accumulate = CapturedGradients(compute, list(trained_parameters(optimiser)), _log)
    return (
        accumulate,
        optimiser,
        student.spec.vocab_size,
        flops_per_token(stage, student.spec),
    )


def _original(
    training: Training, device: torch.device
) -> tuple[Gradients, torch.optim.Optimizer, int, int]:
    from supra_torch.inference.transformers_backend import causal_language_model

    stage = training.config.stages[0]
    source = open_source(training.config.model)
    model: Any = causal_language_model(source, dtype=torch.float32).to(device).train()
    if training.config.activation_checkpointing:
        model.gradient_checkpointing_enable()
    optimiser = adamw(
        (
            (parameter, stage.learning_rate, stage.weight_decay if parameter.dim() >= 2 else 0.0)
            for parameter in model.parameters()
        ),
        stage,
    )

    def accumulate(batches: Sequence[Batch]) -> Tensor:
        (batch,) = batches
        ids = batch.ids
        with autocast(device, training.precision):
            loss: Tensor = model(ids, labels=ids, use_cache=False).loss
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    flops = 6 * multiplied_weights(source.spec)
    return accumulate, optimiser, model.config.vocab_size, flops


def _log(text: str) -> None:
    print(text, file=sys.stderr)
