"""One uptraining run: from a config to a finished model, resumable at any moment.

On one process, or on as many as torchrun started; :mod:`supra_torch.run_folder.folder` says what
the run's folder holds.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
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
from supra_core.tensors import LazyTensor
from supra_torch.calibration.conversion import calibrated_tensors
from supra_torch.distributed.processes import Processes, processes
from supra_torch.precision import resolved_precision
from supra_torch.recipes.config import UptrainConfig
from supra_torch.run_folder import checkpoint
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
from supra_torch.uptrain.step.data import Mixture, mixture, refuse_too_little, refuse_unfit, stored
from supra_torch.uptrain.train import train
from supra_torch.uptrain.watch import refuse_missing, sinks


def uptrain(
    config: UptrainConfig,
    run: Path,
    *,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train, or go on training, and write ``run``/model; returns a summary.

    ``say`` is told, in a line, what progress does not show; in a run of many processes, the
    first one's is. Raises SupraError when ``run`` belongs to another config, the inputs do not
    fit, or the loss is no longer finite (the last checkpoint stays). On Ctrl-C a checkpoint is
    written before KeyboardInterrupt, on SIGTERM before Preempted. When one of many processes
    fails, all do, and those that have nothing to add raise EndedByAnother.
    A process by itself keeps the memory that it frees (:func:`keep_freed_memory`).
    """
    # Until all have joined there is nothing to save, and who waits for the others hears no signal.
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
                return _uptrain(config, run, every, stop, lock, progress, say)
        finally:
            lock.release()


def _uptrain(
    config: UptrainConfig,
    run: Path,
    every: Processes,
    stop: Stop,
    lock: Lock,
    progress: Progress,
    say: Callable[[str], None],
) -> dict[str, Any]:
    precision = _agreed_precision(config, every)
    with every.first_alone():
        if every.is_first:
            lock.take()
        refuse_another_run(run, config)
        config.refuse_uneven(every.size)
        refuse_missing(config.report_to)
        summary_file = run / "summary.json"
        if summary_file.is_file() and (run / "model").is_dir():
            return {**read_object(summary_file), "already_finished": True}
        inputs = open_inputs(config)
        data = _claimed(config, run, inputs, every, lock, precision, progress, say)
        begins = _calibrated(config, run, inputs, data, every, precision, progress)
    if every.size == 1:
        # Shards come and go in pieces of every size, between which a heap that is kept grows.
        keep_freed_memory()
    place = checkpoint.newest_place(run, every)
    every.wait()
    if every.is_first:
        trim_log(run, place)
        if (run / CALIBRATED).is_file():
            log_calibration(run)
    if place.step:
        say(f"{run} goes on after step {place.step} of {sum(config.stage_steps())}")
    wanted = config.report_to if every.is_first else ()
    with sinks(wanted, run, config.model_dump(mode="json"), place.step) as opened:
        session = Session(
            config=config,
            run=run,
            processes=every,
            stop=stop,
            precision=precision,
            data=data,
            teacher=None,
            spec=inputs.student_spec,
            begins=begins,
            assets=inputs.student_assets,
            progress=progress,
            say=say,
            sinks=opened,
        )
        summary = train(session, place, inputs.teacher)
    checkpoint.check(checkpoint.folder_of(run, summary["steps"]), every)
    if every.is_first:
        _write_model(session, progress)
        with atomic_file(summary_file) as beside:
            beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    every.wait()
    return {**summary, "already_finished": False}


def _agreed_precision(config: UptrainConfig, every: Processes) -> str:
    """The precision of all processes: machines may differ, and what they exchange may not."""
    found = resolved_precision(config.precision, every.device)
    (without,) = every.sums([float(found != "bf16")])
    return "float32" if without else found


def _claimed(
    config: UptrainConfig,
    run: Path,
    inputs: Inputs,
    every: Processes,
    lock: Lock,
    precision: str,
    progress: Progress,
    say: Callable[[str], None],
) -> Mixture:
    """The run's text in tokens, in a folder that is this run's; SupraError when it will not do."""
    refuse_another_recipe(config, inputs.student_spec)
    refuse_unfit(config.data_parts, inputs.student_assets)
    existed, begun = run.is_dir(), metrics_of(run).is_file()
    claim(run, config, precision, every.size)
    if every.is_first:
        lock.take()
        clear(run)
    try:
        return _data(config, run, inputs, progress, say, begun, every.is_first)
    except WriteError:
        # The same command goes on once there is room.
        raise
    except SupraError:
        if not begun and every.is_first:
            unclaim(run, existed)
        raise


def _data(
    config: UptrainConfig,
    run: Path,
    inputs: Inputs,
    progress: Progress,
    say: Callable[[str], None],
    begun: bool,
    check: bool,
) -> Mixture:
    """The run's text in tokens; SupraError when it is not enough, or has changed."""
    parts = config.data_parts
    tokens = stored(
        parts, inputs.student_assets, inputs.student_spec, run / "data", progress, begun=begun,
        check=check,
    )  # fmt: skip
    for part, store in zip(parts, tokens, strict=True):
        # Older versions did not count it.
        if left_out := store.index.get("left_out"):
            say(f"not read in {part.path}: {in_words(left_out)}")
    apart = config.documents == "apart"
    lead = next(iter(inputs.tokenizer.begins), None)
    data = mixture(parts, tokens, config.sequence_length, config.seed, apart, lead)
    refuse_too_little(data, parts, config.tokens, config.epochs)
    return data


def _calibrated(
    config: UptrainConfig,
    run: Path,
    inputs: Inputs,
    data: Mixture,
    every: Processes,
    precision: str,
    progress: Progress,
) -> Mapping[str, LazyTensor]:
    """The weights to begin with: a freshly converted student's are fitted in closed form first.

    By the first process, for all and once a run, with one layer of each model in memory.
    """
    file = run / CALIBRATED
    if every.is_first and checkpoint.newest(run) is None:
        broken = first_not_finite(inputs.student_tensors)
        if broken is not None:
            raise SupraError(
                f"{config.model}: {broken} holds NaN or infinity, which nothing can be learned "
                "with: get the model again"
            )
    origin = inputs.student_spec.provenance
    before = origin.trained_tokens or origin.calibration_tokens
    wanted = config.calibrate != "none" and config.calibrate_tokens and not before
    if inputs.teacher is None or not wanted or checkpoint.newest(run):
        return inputs.student_tensors
    if not file.is_file() and every.is_first:
        cut = config.calibration_cut
        rows = max(2, config.calibrate_tokens // (config.sequence_length // cut))
        began = time.perf_counter()
        ids = torch.from_numpy(data.batch(0, rows, cut).ids).to(every.device)
        changed, fits = calibrated_tensors(
            inputs.teacher, inputs.student_spec, inputs.student_tensors, ids, precision,
            outputs=config.calibrate == "all", progress=progress,
        )  # fmt: skip
        record = {
            "calibration": [asdict(fit) for fit in fits],
            "step": 0,
            "calibration_tokens": ids.numel(),
            "seconds": time.perf_counter() - began,
        }
        write_calibrated(run, changed, record)
    return {**inputs.student_tensors, **read_calibrated(run, inputs.student_tensors)}


def _write_model(session: Session, progress: Progress) -> None:
    """The finished model, tensor by tensor from the last checkpoint."""
    newest = checkpoint.newest(session.run)
    assert newest is not None
    last = artifact.read(newest / "model")
    artifact.write(
        session.run / "model",
        last.spec,
        last.tensors,
        session.assets,
        force=True,
        dtype="float32",
        progress=lambda done, total: progress("write", done, total),
    )
