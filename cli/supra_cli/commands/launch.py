"""``supra launch``: job files of schedulers that run ``supra uptrain`` on many GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supra_cli.shared import options

if TYPE_CHECKING:
    from supra_cli.launch.job import Job

app = typer.Typer(
    no_args_is_help=True,
    help="Print a job file for a scheduler; the job resumes until the run is done.",
)

Config = Annotated[str, typer.Argument(metavar="CONFIG.toml", help="Settings of the run.")]
Nodes = Annotated[int, typer.Option(help="Number of nodes.")]
Gpus = Annotated[int, typer.Option(help="GPUs per node.")]
Run = Annotated[
    str | None, typer.Option(help="Run folder; default: runs/ plus the name of the config.")
]
Name = Annotated[str | None, typer.Option(help="Job name; default: the name of the config.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
]
Grace = Annotated[int, typer.Option(help="Seconds to write the last checkpoint after SIGTERM.")]
Out = Annotated[Path | None, typer.Option(help="Write the job file here instead of stdout.")]


@app.command("slurm")
def slurm(
    config: Config,
    nodes: Nodes = 1,
    gpus: Gpus = 8,
    run: Run = None,
    name: Name = None,
    settings: Settings = None,
    grace: Grace = 300,
    time: Annotated[str, typer.Option(help="Time limit (sbatch --time).")] = ("1-00:00:00"),
    cpus: Annotated[int, typer.Option(help="CPU cores per GPU.")] = 8,
    partition: Annotated[str | None, typer.Option(help="Slurm partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm account.")] = None,
    out: Out = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Print a file for sbatch; the job queues again until the run is done."""
    from supra_cli.launch import files

    job = _job(config, nodes, gpus, run, name, settings, grace)
    more: dict[str, Any] = {"time": time, "cpus": cpus, "partition": partition, "account": account}
    made = _JobFile("slurm", "sbatch", job, more, files.slurm(job, **more))
    _give(made, out, force, json_output)


@app.command("kubernetes")
def kubernetes(
    config: Config,
    image: Annotated[str, typer.Option(help="Container image with supra and torch.")],
    nodes: Nodes = 1,
    gpus: Gpus = 8,
    run: Run = None,
    name: Name = None,
    settings: Settings = None,
    grace: Grace = 300,
    volume: Annotated[
        str, typer.Option(help="PersistentVolumeClaim for text and runs, writable by every node.")
    ] = "supra",
    out: Out = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Print an Indexed Job for kubectl; no operator is needed."""
    from supra_cli.launch import files

    job = _job(config, nodes, gpus, run, name, settings, grace)
    more = {"image": image, "volume": volume}
    made = _JobFile("kubernetes", "kubectl apply -f", job, more, files.kubernetes(job, **more))
    _give(made, out, force, json_output)


@app.command("skypilot")
def skypilot(
    config: Config,
    nodes: Nodes = 1,
    gpus: Gpus = 8,
    run: Run = None,
    name: Name = None,
    settings: Settings = None,
    grace: Grace = 300,
    volume: Annotated[str, typer.Option(help="Volume for text and runs.")] = "supra",
    accelerator: Annotated[str, typer.Option(help="GPU model.")] = "H100",
    spot: Annotated[bool, typer.Option(help="Use spot instances, which may be preempted.")] = True,
    install: Annotated[str, typer.Option(help="Packages that pip installs on every node.")] = (
        "supra-lm[torch,data]"
    ),
    out: Out = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Print a task for sky jobs launch, which replaces preempted machines."""
    from supra_cli.launch import files

    job = _job(config, nodes, gpus, run, name, settings, grace)
    more: dict[str, Any] = {
        "volume": volume,
        "accelerator": accelerator,
        "spot": spot,
        "install": install,
    }
    made = _JobFile("skypilot", "sky jobs launch", job, more, files.skypilot(job, **more))
    _give(made, out, force, json_output)


def _job(
    config: str,
    nodes: int,
    gpus: int,
    run: str | None,
    name: str | None,
    settings: list[str] | None,
    grace: int,
) -> Job:
    from supra_cli.launch.job import job

    overrides = options.overrides(settings or [])
    return job(config, nodes=nodes, gpus=gpus, run=run, name=name, overrides=overrides, grace=grace)


@dataclass(frozen=True)
class _JobFile:
    """``text`` of a job for a ``scheduler``; ``submit``: its command; ``more``: its own options."""

    scheduler: str
    submit: str
    job: Job
    more: Mapping[str, Any]
    text: str


def _give(made: _JobFile, out: Path | None, force: bool, json_output: bool) -> None:
    """Write or print a job file."""
    import shlex

    from supra_cli.shared.output import log, print_json, write_piece
    from supra_core.formats.atomic import atomic_file, check_new_file

    if out is not None:
        check_new_file(out, force)
        with atomic_file(out, replace=force) as beside:
            beside.write_text(made.text, encoding="utf-8")
        log(f"Submit it: {made.submit} {shlex.quote(str(out))}")
    if json_output:
        job = made.job
        shared = {
            "scheduler": made.scheduler, "config": job.file, "run": job.run, "name": job.name,
            "nodes": job.nodes, "gpus": job.gpus, "grace": job.grace, "set": job.overrides,
        }  # fmt: skip
        last = {"settings": job.config.model_dump(mode="json"), "text": made.text}
        print_json({**shared, **made.more, "out": out and str(out), **last})
    elif out is None:
        write_piece(made.text)
