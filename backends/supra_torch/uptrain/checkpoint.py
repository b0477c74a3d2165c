"""Checkpoints: the model as an artifact folder, the optimiser beside it, written whole or not.

``RUN/checkpoints/step_00000050/`` holds ``model/`` (an artifact), ``optimiser.safetensors`` and
``state.json``; in a stage that trains adapters the model is without them, and they stand in
``adapters.safetensors``. The newest two are kept, so that one bad disk block loses little.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from supra_core import artifact
from supra_core.formats.atomic import atomic_folder
from supra_core.formats.jsonfile import read_object
from supra_core.sources import ADAPTERS
from supra_core.spec import ModelSpec
from supra_torch.model import SupraModel
from supra_torch.uptrain.lora import adapters, frozen_tensors

_KEPT = 2


@dataclass(frozen=True)
class Place:
    """Where a run stands: the stage, the steps done in it, and in all."""

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    tokens: int = 0


def save(
    run: Path,
    place: Place,
    model: SupraModel,
    spec: ModelSpec,
    assets: Mapping[str, bytes],
    optimiser: torch.optim.Optimizer | None,
    names: Mapping[nn.Parameter, str],
) -> Path:
    """Write a checkpoint and drop the oldest ones.

    ``optimiser`` None: between two stages, of which each has its own.
    """
    out = run / "checkpoints" / f"step_{place.step:08d}"
    with atomic_folder(out, force=True) as folder:
        artifact.write(
            folder / "model", spec, frozen_tensors(model), assets, force=False, dtype="float32"
        )
        if added := adapters(model):
            save_file(added, folder / ADAPTERS)
        if optimiser is not None:
            save_file(_optimiser_tensors(optimiser, names), folder / "optimiser.safetensors")
        (folder / "state.json").write_text(json.dumps(asdict(place)), encoding="utf-8")
    for old in checkpoints(run)[:-_KEPT]:
        shutil.rmtree(old)
    return out


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    if not folder.is_dir():
        return []
    found = (path for path in folder.iterdir() if path.name.startswith("step_"))
    return sorted(path for path in found if (path / "state.json").is_file())


def read_place(checkpoint: Path) -> Place:
    """Where the run stood at a checkpoint."""
    return Place(**read_object(checkpoint / "state.json"))


def load_optimiser(
    checkpoint: Path, optimiser: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> None:
    """Put a checkpoint's optimiser state into ``optimiser``, parameter by parameter."""
    stored = load_file(checkpoint / "optimiser.safetensors")
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            prefix = names[parameter] + "/"
            state = {key: stored[prefix + key] for key in ("step", "exp_avg", "exp_avg_sq")}
            optimiser.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device)
                for key, value in state.items()
            }


def read_adapters(checkpoint: Path) -> dict[str, Tensor]:
    """The adapters of a checkpoint inside a stage that trains them."""
    return load_file(checkpoint / ADAPTERS)


def _optimiser_tensors(
    optimiser: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]
) -> dict[str, Tensor]:
    tensors = {}
    for parameter in (p for group in optimiser.param_groups for p in group["params"]):
        for key, value in optimiser.state[parameter].items():
            tensors[f"{names[parameter]}/{key}"] = value.detach().cpu().contiguous()
    return tensors
