"""One uptraining run: from a config to a finished model, resumable at any moment.

In one process, or in as many as torchrun started; :mod:`supra_torch.run_folder.folder` says what
the run's folder holds. The phases are below, in the order in which they happen; the training
itself is :mod:`supra_torch.uptrain.train`, and one stage of it :mod:`supra_torch.uptrain.stage`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from supra_core.artifact import folder as artifact
from supra_core.data.documents import in_words
from supra_core.errors import SupraError, WriteError
from supra_core.formats.atomic import atomic_file
from supra_core.formats.finite import first_not_finite
from supra_core.formats.jsonfile import read_object
from supra_core.progress import Progress, silent
from supra_torch.calibration.conversion import calibrated_tensors
from supra_torch.distributed.processes import Processes, processes
from supra_torch.precision import resolved_precision
from supra_torch.recipes.config import UptrainConfig
from supra_torch.run_folder import checkpoint
from supra_torch.run_folder.checkpoint import Place
from supra_torch.run_folder.folder import (
    CALIBRATED,
    claim,
    clear,
    log_calibration,
    metrics_of,
    read_calibrated,
    refuse_another_run,
    trim_log,
    unclaim,
    write_calibrated,
)
from supra_torch.run_folder.lock import Lock
from supra_torch.uptrain.inputs import Inputs, open_inputs, refuse_another_recipe
from supra_torch.uptrain.interrupts import Stop
from supra_torch.uptrain.memory import keep_freed_memory, memory_errors
from supra_torch.uptrain.session import Session
from supra_torch.uptrain.step.data import Mixture, Texts, mixture, refuse_too_little
from supra_torch.uptrain.train import train
from supra_torch.uptrain.watch import refuse_missing, sinks

_SUMMARY = "summary.json"


def uptrain(
    config: UptrainConfig,
    run: Path,
    *,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train, or resume training, and write ``run``/model; returns a summary.

    ``say`` takes, in a line, what progress does not show; of many processes, only rank 0 calls
    it. Raises SupraError when ``run`` belongs to another config, the inputs do not fit, or the
    loss is no longer finite (the last checkpoint stays). On Ctrl-C a checkpoint is written before
    KeyboardInterrupt, on SIGTERM before Preempted. When one of many processes fails, all do, and
    those that have nothing to add raise EndedByAnother.
    A single process keeps the memory that it frees (:func:`keep_freed_memory`).
    """
    # Until all have joined there is nothing to save, and a process that waits hears no signal.
    joined = processes(
        config.devices_together,
        two_axes=config.sums_exactly,
        context_parallel=config.context_parallel,
    )
    with joined as every, Stop() as stop:
        if not every.is_first:
            progress, say = silent, lambda text: None
        lock = Lock(run, say)
        try:
            with memory_errors(run):
                precision = _agreed_precision(config, every)
                session = Session(config, run, every, stop, precision, progress, say)
                return _uptrain(session, lock)
        finally:
            lock.release()


def _uptrain(session: Session, lock: Lock) -> dict[str, Any]:
    config, run, every = session.config, session.run, session.processes
    with every.first_alone():
        if every.is_first:
            lock.take()
        refuse_another_run(run, config)
        config.refuse_uneven(every.size)
        refuse_missing(config.report_to)
        if (run / _SUMMARY).is_file() and (run / "model").is_dir():
            return {**read_object(run / _SUMMARY), "already_finished": True}
        inputs = open_inputs(config)
        data = _claim(session, inputs, lock)
        inputs = _calibrated(session, inputs, data)
    if every.size == 1:
        # Shards come and go in pieces of every size, between which a heap that is kept grows.
        keep_freed_memory()
    place = _resumed(session)
    wanted = config.report_to if every.is_first else ()
    with sinks(wanted, run, config.model_dump(mode="json"), place.step) as opened:
        summary = train(replace(session, sinks=opened), inputs, data, place)
    _finish(session, inputs, summary)
    return {**summary, "already_finished": False}


def _agreed_precision(config: UptrainConfig, every: Processes) -> str:
    """The precision of all processes: machines may differ, and what they exchange may not."""
    found = resolved_precision(config.precision, every.device)
    (without,) = every.sums([float(found != "bf16")])
    return "float32" if without else found


def _claim(session: Session, inputs: Inputs, lock: Lock) -> Mixture:
    """Make the folder this run's, and tokenise its text; SupraError when the text will not do."""
    config, run, is_first = session.config, session.run, session.processes.is_first
    refuse_another_recipe(config, inputs.student_spec)
    texts = Texts(config.data_parts, inputs.student_assets, inputs.student_spec, run / "data")
    texts.refuse_unfit()
    existed, begun = run.is_dir(), metrics_of(run).is_file()
    claim(run, config, session.precision, session.processes.size)
    if is_first:
        lock.take()
        clear(run)
    try:
        return _tokenised(session, inputs, texts, begun)
    except WriteError:
        # The same command resumes once there is room.
        raise
    except SupraError:
        if not begun and is_first:
            unclaim(run, existed)
        raise


def _tokenised(session: Session, inputs: Inputs, texts: Texts, begun: bool) -> Mixture:
    """The run's text in tokens; SupraError when it is too short, or has changed."""
    config, parts = session.config, texts.parts
    tokens = texts.stores(session.progress, begun=begun, check=session.processes.is_first)
    for part, store in zip(parts, tokens, strict=True):
        # Older versions did not count it.
        if left_out := store.index.get("left_out"):
            session.say(f"not read in {part.path}: {in_words(left_out)}")
    apart = config.documents == "apart"
    lead = next(iter(inputs.tokenizer.begins), None)
    data = mixture(parts, tokens, config.sequence_length, config.seed, apart, lead)
    refuse_too_little(data, parts, config.tokens, config.epochs)
    return data


def _calibrated(session: Session, inputs: Inputs, data: Mixture) -> Inputs:
    """The inputs with the weights to begin with: a fresh conversion is fitted in closed form first.

    By rank 0, for all and once a run, with one layer of each model in memory.
    """
    config, run, every = session.config, session.run, session.processes
    file, resumes = run / CALIBRATED, checkpoint.newest(run) is not None
    if every.is_first and not resumes:
        broken = first_not_finite(inputs.student_tensors)
        if broken is not None:
            raise SupraError(
                f"{config.model}: {broken} holds NaN or infinity, which nothing can be learned "
                "with: get the model again"
            )
    origin = inputs.student_spec.provenance
    before = origin.trained_tokens or origin.calibration_tokens
    wanted = config.calibrate != "none" and config.calibrate_tokens and not before
    if inputs.teacher is None or not wanted or resumes:
        return inputs
    if not file.is_file() and every.is_first:
        cut = config.calibration_cut
        rows = max(2, config.calibrate_tokens // (config.sequence_length // cut))
        began = time.perf_counter()
        ids = torch.from_numpy(data.batch(0, rows, cut).ids).to(every.device)
        changed, fits = calibrated_tensors(
            inputs.teacher, inputs.student_spec, inputs.student_tensors, ids, session.precision,
            outputs=config.calibrate == "all", progress=session.progress,
        )  # fmt: skip
        record = {
            "calibration": [asdict(fit) for fit in fits],
            "step": 0,
            "calibration_tokens": ids.numel(),
            "seconds": time.perf_counter() - began,
        }
        write_calibrated(run, changed, record)
    fitted = read_calibrated(run, inputs.student_tensors)
    return replace(inputs, student_tensors={**inputs.student_tensors, **fitted})


def _resumed(session: Session) -> Place:
    """Where the run stands, with a log that ends there."""
    run, every = session.run, session.processes
    place = checkpoint.newest_place(run, every)
    every.wait()
    if every.is_first:
        trim_log(run, place)
        if (run / CALIBRATED).is_file():
            log_calibration(run)
    if place.step:
        session.say(f"{run} resumes after step {place.step} of {sum(session.config.stage_steps())}")
    return place


def _finish(session: Session, inputs: Inputs, summary: dict[str, Any]) -> None:
    """Write the finished model, tensor by tensor from the last checkpoint, and the summary."""
    run, every, progress = session.run, session.processes, session.progress
    newest = checkpoint.folder_of(run, summary["steps"])
    checkpoint.check(newest, every)
    if every.is_first:
        last = artifact.read(newest / "model")
        artifact.write(
            run / "model",
            last.spec,
            last.tensors,
            inputs.student_assets,
            force=True,
            dtype="float32",
            progress=lambda done, total: progress("write", done, total),
        )
        with atomic_file(run / _SUMMARY) as beside:
            beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    every.wait()
