"""Checkpoints, written by all processes during training, whole or not at all.

``RUN/checkpoints/step_00000050/`` holds ``model/`` (an artifact), ``optimiser/``, in a stage that
trains adapters ``adapters/`` (``model/`` is then without them), and ``state.json``. Weights are
safetensors by torch.distributed.checkpoint, each process's parts in a file of its own, so that a
run resumes with any number of processes and no pickle is ever read. Each folder has a
``SHA256SUMS``, which is checked before a run resumes from it.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_saver import save

from supra_core.artifact import folder as artifact
from supra_core.errors import (
    FormatError,
    LayoutError,
    SpecError,
    WriteError,
    reason,
)
from supra_core.formats import checksums, distributed, safetensors
from supra_core.formats.atomic import put_folder, remedy, remove_folder
from supra_core.formats.finite import first_not_finite
from supra_core.formats.jsonfile import read_object
from supra_core.model.spec import ModelSpec
from supra_core.sources.source import ADAPTERS
from supra_core.tensors import LazyTensor
from supra_torch.distributed.processes import Processes
from supra_torch.distributed.sharding import fill, release
from supra_torch.model import lora
from supra_torch.model.model import SupraModel

STATE = "state.json"
MODEL, OPTIMISER = "model", "optimiser"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Place:
    """Where a run stands: the stage, the steps done in it, and in all.

    ``perplexity``: held-out, where it was measured here. ``left_out``: skipped steps of the stage.
    ``passed_over``: tokens skipped in ``rollbacks`` rollbacks, because the run diverged on them.
    """

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    tokens: int = 0
    perplexity: float | None = None
    left_out: int = 0
    passed_over: int = 0
    rollbacks: int = 0


@dataclass(frozen=True)
class _Parts:
    """The content of a checkpoint, copied to the host: folder name -> tensors."""

    place: Place
    spec: ModelSpec
    tensors: dict[str, dict[str, Tensor]]


class Checkpoints:
    """Writes a run's checkpoints, one at a time, during training.

    ``kept``: how many of the newest stay, besides the one of the lowest held-out perplexity.
    ``saved``: the place of the newest one.
    """

    def __init__(
        self,
        run: Path,
        processes: Processes,
        assets: Mapping[str, bytes],
        kept: int,
        saved: Place,
    ) -> None:
        self._run, self._processes, self._assets, self._kept = run, processes, assets, kept
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self.saved = saved

    def save(
        self,
        place: Place,
        spec: ModelSpec,
        model: SupraModel,
        optimiser: torch.optim.Optimizer | None,
        names: Mapping[nn.Parameter, str],
    ) -> None:
        """Begin to write a checkpoint of the current weights; called by every process.

        ``optimiser`` None: between two stages; adapters are merged into their weights. Waits for
        the checkpoint before; raises WriteError when that failed.
        """
        self.wait()
        release(model)
        if optimiser is None:
            tensors = {"model": lora.merged(model)}
        else:
            own: dict[str, Tensor] = dict(model.named_parameters())
            tensors = {
                "model": {lora.canonical(n): p for n, p in own.items() if not lora.is_adapter(n)},
                ADAPTERS: {n: p for n, p in own.items() if lora.is_adapter(n)},
                "optimiser": _optimiser_tensors(optimiser, names),
            }
        copied = {kind: _copied(found) for kind, found in tensors.items() if found}
        self._writing = self._thread.submit(self._write, _Parts(place, spec, copied))
        self.saved = place

    def raise_if_failed(self) -> None:
        """Raise WriteError when the current checkpoint is known to have failed, here."""
        writing = self._writing
        if writing is not None and writing.done() and writing.exception() is not None:
            self.wait()

    def wait(self) -> None:
        """Wait until the current checkpoint is on disk; raises WriteError when it failed."""
        writing, self._writing = self._writing, None
        if writing is None:
            return
        try:
            writing.result()
        except (OSError, CheckpointException) as error:
            cause = _cause(error)
            said, then = str(cause), "start again"
            if isinstance(cause, OSError):
                said, then = reason(cause), remedy(cause)
            raise WriteError(
                f"{self._run}: a checkpoint could not be written ({said}): {then}; the run resumes "
                "from the checkpoint before"
            ) from None

    def close(self) -> None:
        """Wait until nothing is being written any more, whether that succeeds or not."""
        if self._writing is not None:
            wait_for([self._writing])

    def _write(self, parts: _Parts) -> None:
        out = folder_of(self._run, parts.place.step)
        beside = out.with_name(f".{out.name}.partial")
        try:
            for kind, tensors in parts.tensors.items():
                self._write_tensors(beside / kind, tensors)
            if self._processes.is_first:
                artifact.write_without_weights(
                    beside / "model", parts.spec, self._assets, dtype="float32"
                )
                (beside / STATE).write_text(json.dumps(asdict(parts.place)), "utf-8")
                # All processes have written their files by now, and closed them.
                for kind in parts.tensors:
                    checksums.write(beside / kind)
                checksums.write(beside)
                put_folder(beside, out)
                self._drop_old()
        except BaseException:
            if self._processes.is_first:
                shutil.rmtree(beside, ignore_errors=True)
            raise

    def _write_tensors(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        with warnings.catch_warnings():
            # A single process is told that it is one.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save(tensors, storage_writer=writer, process_group=self._processes.saving)  # type: ignore[arg-type]

    def _drop_old(self) -> None:
        found = checkpoints(self._run)
        measured = [(place.perplexity, c) for c in found if (place := read_place(c)).perplexity]
        best = min(measured, default=(None, None))[1]
        for old in found[: -self._kept]:
            if old != best:
                remove_folder(old)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, which training does not change."""
    stager = BlockingAsyncStager(cache_staged_state_dict=False)
    copied: dict[str, Tensor] = stager.stage({name: t.detach() for name, t in tensors.items()})
    return copied


def _cause(error: BaseException) -> BaseException:
    """The first process's failure, where several report."""
    if isinstance(error, CheckpointException) and error.failures:
        return next(failure for failure, _ in error.failures.values())
    return error


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps is."""
    return run / "checkpoints" / f"step_{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.name.startswith("step_"))
    return sorted(path for path in found if (path / STATE).is_file())


def newest(run: Path) -> Path | None:
    """The last complete checkpoint, if there is one."""
    return next(reversed(checkpoints(run)), None)


def read_place(checkpoint: Path) -> Place:
    """The place of a checkpoint; FormatError when its file is not as it was written."""
    file = checkpoint / STATE
    with dispensable(checkpoint):
        stated = read_object(file)
        for name, value in stated.items():
            if not _is_stated(name, value):
                raise FormatError(f"{file}: field {name} is unknown or wrong: get the file again")
        place = Place(**stated)
        if folder_of(checkpoint.parent.parent, place.step).name != checkpoint.name:
            raise FormatError(
                f"{file}: field step is {place.step}, unlike the folder's name: get the file again"
            )
        return place


def _is_stated(name: str, value: object) -> bool:
    """Whether a field of state.json is one of Place's."""
    if name == "perplexity":
        return value is None or type(value) in (int, float)
    return name in Place.__dataclass_fields__ and type(value) is int and 0 <= value < 2**63


def check(checkpoint: Path, processes: Processes) -> None:
    """Raise, in all processes, unless a checkpoint is as it was written; rank 0 reads it.

    Checkpoints of older versions have no checksums, and are only checked for NaN and infinity.
    """

    def look() -> None:
        if processes.is_first:
            _check(checkpoint)

    processes.together(look, f"{checkpoint} is not as it was written")


def _check(checkpoint: Path) -> None:
    with dispensable(checkpoint):
        for folder in (checkpoint, *(checkpoint / kind for kind in (MODEL, OPTIMISER, ADAPTERS))):
            checksums.refuse_changed(folder, "get it again")
        for kind in (MODEL, OPTIMISER, ADAPTERS):
            broken = first_not_finite(_read(checkpoint / kind))
            if broken is not None:
                raise FormatError(
                    f"{checkpoint / kind}: {broken} holds NaN or infinity: get it again"
                )


@contextmanager
def dispensable(checkpoint: Path | None) -> Iterator[None]:
    """Inside, an error about a damaged checkpoint adds how to resume without it."""
    try:
        yield
    except (FormatError, LayoutError, SpecError) as error:
        if checkpoint is None or isinstance(error, _Dispensable):
            raise
        before = [path for path in checkpoints(checkpoint.parent.parent) if path < checkpoint]
        then = f"resume from {before[-1]}" if before else "start the run anew"
        raise _Dispensable(f"{error}; or delete {checkpoint}, to {then}") from None


class _Dispensable(FormatError):
    """The message already has this advice."""


def newest_place(run: Path, processes: Processes) -> Place:
    """The place from which the run resumes, as rank 0 sees it; called by all.

    On a network file system others may still see an older state of the folder.
    """
    found = newest(run) if processes.is_first else None
    (step,) = processes.sums([float(read_place(found).step) if found else 0.0])
    return read_place(folder_of(run, int(step))) if step else Place()


def load_optimiser(
    checkpoint: Path,
    optimiser: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    steps: int,
) -> None:
    """Put a checkpoint's optimiser state into ``optimiser``, which took so many steps."""
    stored = _read(checkpoint / OPTIMISER)
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            moments = {moment: torch.zeros_like(parameter) for moment in _MOMENTS}
            for moment, tensor in moments.items():
                name = f"{names[parameter]}/{moment}"
                fill(tensor, _float32(stored, name, tensor.shape, checkpoint / OPTIMISER))
            # Where torch itself keeps it: elsewhere every step would wait for the device.
            place = parameter.device if group["fused"] else torch.device("cpu")
            count = torch.tensor(float(steps), device=place)
            optimiser.state[parameter] = {"step": count, **moments}


def read_adapters(checkpoint: Path, spec: ModelSpec, rank: int) -> dict[str, LazyTensor]:
    """The adapters of a checkpoint in a stage that trains them."""
    stored, place = _read(checkpoint / ADAPTERS), checkpoint / ADAPTERS
    wanted = lora.shapes(spec, rank)
    return {name: _float32(stored, name, shape, place) for name, shape in wanted.items()}


def _float32(
    stored: Mapping[str, LazyTensor], name: str, shape: Sequence[int], place: Path
) -> LazyTensor:
    """One of the tensors in a folder; FormatError unless it is float32 of ``shape``."""
    found = stored.get(name)
    if found is None or found.shape != tuple(shape) or found.dtype != np.float32:
        said = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
        raise FormatError(f"{place}: {name} {said}, not float32 {list(shape)}: get it again")
    return found


def _read(place: Path) -> dict[str, LazyTensor]:
    """The tensors of a part of a checkpoint; none where it has no such part."""
    if distributed.holds_shards(place):
        return distributed.read_folder(place)
    # Runs from before checkpoints were written by several processes.
    if place.is_dir():
        return safetensors.read_folder(place)
    single = place.with_name(place.name + ".safetensors")
    return safetensors.read_file(single) if single.is_file() else {}


def _optimiser_tensors(
    optimiser: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> dict[str, Tensor]:
    tensors = {}
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            # There is none while every step was skipped.
            state = optimiser.state.get(parameter) or {}
            for moment in _MOMENTS:
                found = state.get(moment)
                tensors[f"{names[parameter]}/{moment}"] = (
                    torch.zeros_like(parameter) if found is None else found
                )
    return tensors
