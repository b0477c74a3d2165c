"""The job files of Slurm, Kubernetes and SkyPilot, from the templates beside this module.

All three run ``templates/again.sh``, which starts torchrun until the run is done.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from supra_cli.launch.job import Job
from supra_core.errors import SupraError

# The forms of sbatch's --time: minutes, hours:minutes:seconds, days-hours and so on.
_TIME = r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}"
_WORD = r"[A-Za-z0-9][A-Za-z0-9_.,+@-]*"
_IMAGE = r"[A-Za-z0-9][A-Za-z0-9_.:/@-]*"
_VOLUME = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?"
# Where Kubernetes and SkyPilot put the volume of the runs.
_MOUNT = "/supra"


def slurm(
    job: Job,
    *,
    time: str = "1-00:00:00",
    cpus: int = 8,
    partition: str | None = None,
    account: str | None = None,
) -> str:
    """A file for sbatch. ``time``: limit of one allocation; ``cpus``: per GPU.

    Raises SupraError for a value that Slurm does not accept.
    """
    _check("time", time, _TIME, "write 12:00:00 or 2-00:00:00, as for sbatch")
    if cpus < 1:
        raise SupraError(f"--cpus {cpus}: at least 1 is needed")
    for option, value in (("partition", partition), ("account", account)):
        if value is not None:
            _check(option, value, _WORD, "use letters, digits and any of _.,+@-")
    return _render("slurm.sbatch", job, time=time, cpus=cpus, partition=partition, account=account)


def kubernetes(job: Job, *, image: str, volume: str = "supra") -> str:
    """Manifests for kubectl: the config and the script, a Service, and an Indexed Job.

    ``image``: has supra and torch; ``volume``: a claim that every node can write to. Raises
    SupraError for a name that Kubernetes does not accept, and for a recipe in a file.
    """
    _refuse_recipe_file(job)
    _check("image", image, _IMAGE, "write REGISTRY/NAME:TAG")
    _check("volume", volume, _VOLUME, "name a PersistentVolumeClaim")
    text = Path(job.file).read_text("utf-8")
    return _render("kubernetes.yaml", job, image=image, volume=volume, mount=_MOUNT, text=text)


def skypilot(
    job: Job,
    *,
    volume: str = "supra",
    accelerator: str = "H100",
    spot: bool = True,
    install: str = "supra-lm[torch,data]",
) -> str:
    """A task for ``sky jobs launch``. ``install``: packages for pip on every node.

    ``volume``: made by ``sky volumes apply``. Raises SupraError for a name that SkyPilot does not
    accept, and for a recipe in a file.
    """
    _refuse_recipe_file(job)
    _check("volume", volume, _VOLUME, "name a volume of sky volumes apply")
    _check("accelerator", accelerator, r"[A-Za-z][A-Za-z0-9-]*", "write H100 or A100-80GB")
    if not install.isprintable() or not install:
        raise SupraError(f"--install {install!a}: write the packages in one line")
    return _render(
        "skypilot.yaml",
        job,
        volume=volume,
        accelerator=accelerator,
        spot=spot,
        install=install,
        mount=_MOUNT,
    )


def _check(option: str, value: str, pattern: str, remedy: str) -> None:
    if not re.fullmatch(pattern, value, re.ASCII):
        raise SupraError(f"--{option} {value!a}: {remedy}")


def _refuse_recipe_file(job: Job) -> None:
    """Only the config itself is copied to the nodes."""
    if job.config.recipe.endswith(".toml"):
        raise SupraError(
            f"{job.file}: recipe {job.config.recipe} is a file, which the job's nodes do not have: "
            "write its settings and stages to the config"
        )


def _render(template: str, job: Job, **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("supra_cli.launch", "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"shell": shlex.quote, "yaml": yaml_string, "block": yaml_block}
    return environment.get_template(template).render(job=job, **values)


def yaml_string(text: str) -> str:
    r"""Any text as a double-quoted scalar of YAML in one line: \UXXXXXXXX is any character."""
    escaped = {'"': r"\"", "\\": r"\\"}
    written = (
        escaped.get(char, char) if char.isprintable() else rf"\U{ord(char):08x}" for char in text
    )
    return f'"{"".join(written)}"'


def yaml_block(text: str, indent: int) -> str:
    """A text as a literal block of ``indent`` spaces; quoted where a block cannot hold it."""
    plain = all(char.isprintable() or char in "\n\t" for char in text)
    if not plain or not text.endswith("\n") or text.endswith("\n\n"):
        return yaml_string(text)
    # Two more spaces than the key has, stated: the first line may begin with a space itself.
    lines = text.splitlines()
    return "|2\n" + "\n".join(" " * indent + line if line else "" for line in lines)
