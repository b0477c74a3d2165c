"""``supra launch``: job files of schedulers that run ``supra uptrain`` on many GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supra_cli.shared import options

if TYPE_CHECKING:
    from supra_cli.launch.job import Job

app = typer.Typer(no_args_is_help=True, help="Print a job file that uptrains until it is done.")

Config = Annotated[str, typer.Argument(metavar="CONFIG.toml", help="The run's settings.")]
Nodes = Annotated[int, typer.Option(help="Machines.")]
Gpus = Annotated[int, typer.Option(help="GPUs of each machine.")]
Run = Annotated[str | None, typer.Option(help="Run folder; default: runs/ and the config's name.")]
Name = Annotated[str | None, typer.Option(help="The job's; default: the config's.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
]
Grace = Annotated[int, typer.Option(help="Seconds for the last checkpoint when told to end.")]
Out = Annotated[Path | None, typer.Option(help="File to write instead of stdout.")]


@app.command("slurm")
def slurm(
    config: Config,
    nodes: Nodes = 1,
    gpus: Gpus = 8,
    run: Run = None,
    name: Name = None,
    settings: Settings = None,
    grace: Grace = 300,
    time: Annotated[str, typer.Option(help="Of one allocation, as sbatch takes it.")] = (
        "1-00:00:00"
    ),
    cpus: Annotated[int, typer.Option(help="CPU cores for each GPU.")] = 8,
    partition: Annotated[str | None, typer.Option(help="Of the cluster.")] = None,
    account: Annotated[str | None, typer.Option(help="That the time is charged to.")] = None,
    out: Out = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """A file for sbatch, which queues again until the run is done."""
    from supra_cli.launch import files

    job = _job(config, nodes, gpus, run, name, settings, grace)
    text = files.slurm(job, time=time, cpus=cpus, partition=partition, account=account)
    more = {"time": time, "cpus": cpus, "partition": partition, "account": account}
    _give("slurm", "sbatch", job, text, more, out, force, json_output)


@app.command("kubernetes")
def kubernetes(
    config: Config,
    image: Annotated[str, typer.Option(help="Container image that holds supra and torch.")],
    nodes: Nodes = 1,
    gpus: Gpus = 8,
    run: Run = None,
    name: Name = None,
    settings: Settings = None,
    grace: Grace = 300,
    volume: Annotated[
        str, typer.Option(help="Claim for text and runs that every node can write to.")
    ] = "supra",
    out: Out = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Manifests of an Indexed Job for kubectl; no operator is needed."""
    from supra_cli.launch import files

    job = _job(config, nodes, gpus, run, name, settings, grace)
    text = files.kubernetes(job, image=image, volume=volume)
    more = {"image": image, "volume": volume}
    _give("kubernetes", "kubectl apply -f", job, text, more, out, force, json_output)


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
    accelerator: Annotated[str, typer.Option(help="Kind of GPU.")] = "H100",
    spot: Annotated[bool, typer.Option(help="Machines that may be taken away.")] = True,
    install: Annotated[str, typer.Option(help="What pip installs on every machine.")] = (
        "supra-lm[torch,data]"
    ),
    out: Out = None,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """A task for sky jobs launch, which finds machines again where some were taken away."""
    from supra_cli.launch import files

    job = _job(config, nodes, gpus, run, name, settings, grace)
    more = {"volume": volume, "accelerator": accelerator, "spot": spot, "install": install}
    text = files.skypilot(job, volume=volume, accelerator=accelerator, spot=spot, install=install)
    _give("skypilot", "sky jobs launch", job, text, more, out, force, json_output)


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


def _give(
    scheduler: str,
    submit: str,
    job: Job,
    text: str,
    more: dict[str, Any],
    out: Path | None,
    force: bool,
    json_output: bool,
) -> None:
    """Write or print a job file."""
    import shlex

    from supra_cli.shared.output import log, print_json, write_piece
    from supra_core.formats.atomic import atomic_file, check_new_file

    if out is not None:
        check_new_file(out, force)
        with atomic_file(out, replace=force) as beside:
            beside.write_text(text, encoding="utf-8")
        log(f"submit it: {submit} {shlex.quote(str(out))}")
    if json_output:
        shared = {
            "scheduler": scheduler, "config": job.file, "run": job.run, "name": job.name,
            "nodes": job.nodes, "gpus": job.gpus, "grace": job.grace, "set": job.overrides,
        }  # fmt: skip
        settings = job.config.model_dump(mode="json")
        print_json({**shared, **more, "out": out and str(out), "settings": settings, "text": text})
    elif out is None:
        write_piece(text)
