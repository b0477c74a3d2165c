"""A job, for any scheduler; checked before a file is written. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from supra_core.errors import SupraError

if TYPE_CHECKING:
    from supra_torch.recipes.config import UptrainConfig

# A DNS label that begins with a letter (RFC 1035), and short enough for an index behind it.
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?")


@dataclass(frozen=True)
class Job:
    """A run and its devices.

    ``config``: the settings in ``file`` with ``overrides``; ``run``: the run's folder; ``gpus``:
    per node; ``grace``: seconds to write the last checkpoint after SIGTERM.
    """

    file: str
    config: UptrainConfig
    overrides: Mapping[str, str]
    run: str
    name: str
    nodes: int
    gpus: int
    grace: int

    @property
    def settings(self) -> list[str]:
        """The overrides as ``uptrain --set`` takes them."""
        return [f"{key}={value}" for key, value in self.overrides.items()]


def job(
    file: str | Path,
    *,
    nodes: int = 1,
    gpus: int = 8,
    run: str | Path | None = None,
    name: str | None = None,
    overrides: Mapping[str, str] | None = None,
    grace: int = 300,
) -> Job:
    """The job of a config; ``run``: runs/ plus the name of the config by default.

    Raises SupraError when the config is wrong, ``nodes`` x ``gpus`` processes cannot share its
    batches evenly, or a path or a name cannot stand in a job file.
    """
    path = Path(file)
    if path.suffix != ".toml":
        raise SupraError(f"{file} is not a .toml file: write model, data and settings to one")
    for option, number in (("nodes", nodes), ("gpus", gpus)):
        if number < 1:
            raise SupraError(f"--{option} {number}: at least 1 is needed")
    if grace < 60:
        raise SupraError(f"--grace {grace}: must be at least 60 seconds")
    from supra_torch.recipes.config import resolve

    config = resolve(config=path, model=None, recipe=None, data=None, overrides=overrides or {})
    _refuse_uneven(path, config, nodes * gpus, gpus)
    made = Job(
        file=_argument(path),
        config=config,
        overrides=dict(overrides or {}),
        run=_argument(run if run is not None else Path("runs") / path.stem),
        name=_name_of(path) if name is None else name,
        nodes=nodes,
        gpus=gpus,
        grace=grace,
    )
    if not _NAME.fullmatch(made.name):
        raise SupraError(
            f"--name {made.name}: use lower-case letters, digits and hyphens, a letter first, "
            "50 at most"
        )
    for text in (made.file, made.run, *made.settings):
        if not text.isprintable():
            raise SupraError(
                f"{text!a} has a line break or an unprintable character, which a job file cannot "
                "hold: choose another name"
            )
    return made


def _refuse_uneven(file: Path, config: UptrainConfig, processes: int, gpus: int) -> None:
    try:
        config.refuse_uneven(processes)
    except SupraError as error:
        raise SupraError(f"{file}: {error}") from None
    together = config.devices_together or gpus
    if processes % together:
        raise SupraError(
            f"{file}: devices_together {together} does not divide {processes} GPUs: set a divisor"
        )


def _argument(path: str | Path) -> str:
    """A path as an argument that does not look like an option."""
    text = str(path)
    return f"./{text}" if text.startswith("-") else text


def _name_of(file: Path) -> str:
    """The config's name in characters that every scheduler accepts."""
    words = re.sub(r"[^a-z0-9]+", "-", file.stem.lower()).strip("-")
    return (words if words[:1].isalpha() else f"supra-{words}")[:50].strip("-")
