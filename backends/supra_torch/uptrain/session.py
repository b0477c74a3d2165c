"""What every phase of a run needs: its config, its folder, its processes, and whom to tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from supra_core.progress import Progress
from supra_torch.distributed.processes import Processes
from supra_torch.precision import autocast
from supra_torch.recipes.config import UptrainConfig
from supra_torch.run_folder.folder import log
from supra_torch.uptrain.interrupts import Stop, stop_if_asked
from supra_torch.uptrain.watch import Sink, figures


@dataclass(frozen=True)
class Session:
    """Everything that is the same from the first phase of a run to the last.

    ``precision``: of matrix products, agreed by all processes. ``say`` takes a line for the user.
    """

    config: UptrainConfig
    run: Path
    processes: Processes
    stop: Stop
    precision: str
    progress: Progress
    say: Callable[[str], None]
    sinks: Sequence[Sink] = ()

    @property
    def device(self) -> torch.device:
        return self.processes.device

    def autocast(self) -> torch.autocast:
        sharded = self.processes.mesh is not None
        return autocast(self.device, self.precision, sharded=sharded)

    def log(self, record: Mapping[str, Any]) -> None:
        """Rank 0 writes a line to metrics.jsonl, and its figures to the sinks."""
        if not self.processes.is_first:
            return
        log(self.run, record)
        for sink in self.sinks:
            sink.add(record["step"], figures(record))

    def save_together(self, save: Callable[[], None]) -> list[float]:
        """Run ``save`` in every process; if it fails in one, raise in all.

        Returns the signals that any of them received (:meth:`Stop.flags`).
        """
        return self.processes.together(
            save, f"{self.run}: another process could not save", self.stop.flags()
        )

    def stop_if_asked(self) -> None:
        """Raise, in all processes, what signals to any of them ask for; called by all."""
        if self.stop.is_held:
            stop_if_asked(self.processes.sums(self.stop.flags()))
