"""``supra plan``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supra_cli.shared import options

if TYPE_CHECKING:
    from supra_core.model.sizes import Sizes
    from supra_torch.plan.plan import Plan

# What the parts of memory are, for people.
_PARTS = {
    "weights": "weights, float32",
    "teacher": "teacher",
    "optimiser": "optimiser",
    "gradients": "gradients",
    "gathered": "gathered from other devices",
    "activations": "activations",
    "buffers": "inside operators",
    "checkpoint": "checkpoint being written",
    "heap": "between allocations",
    "runtime": "libraries",
}

_STAGE = (
    "kind", "steps", "step_tokens", "flops_per_token", "received_bytes", "step_seconds",
    "least_step_seconds",
)  # fmt: skip
_STUDENT = (
    "parameters", "active_parameters", "state_bytes", "growing_bytes_per_token",
    "kv_bytes_per_token", "break_even_tokens",
)  # fmt: skip


def command(
    start: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG.toml|MODEL",
            help="Settings of a run, or a model: anything supra convert reads, or a config.json.",
        ),
    ],
    recipe: Annotated[
        str | None, typer.Option(help="Recipe: a name or a .toml file; default: windowed.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens in all stages.")] = None,
    gpu: Annotated[
        str, typer.Option(help="Device model, such as h100; cpu measures this machine.")
    ] = "h100",
    gpus: Annotated[int, typer.Option(help="GPUs per node.")] = 1,
    nodes: Annotated[int, typer.Option(help="Number of nodes.")] = 1,
    price: Annotated[
        float | None, typer.Option(help="Price of a device hour, in any currency.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Estimate the memory, time and cost of a run."""
    from supra_cli.shared.backends import require
    from supra_cli.shared.output import print_json
    from supra_cli.shared.progress import ProgressReporter
    from supra_core.errors import SupraError

    if price is not None and not 0 <= price < 1e9:
        raise SupraError(f"--price {price:g}: must be at least 0 and below 1e9")
    require("torch", "planning")
    from supra_torch.plan.plan import plan
    from supra_torch.recipes.config import resolve

    overrides = options.overrides(settings or [])
    if tokens is not None:
        overrides["tokens"] = str(tokens)
    is_config = start.endswith(".toml")
    config = resolve(
        config=Path(start) if is_config else None,
        model=None if is_config else start,
        recipe=recipe,
        # A plan reads no text.
        data=None if is_config else "none",
        overrides=overrides,
    )
    if not is_config and "batch_tokens" not in overrides:
        # Each device takes what the recipe gives to one.
        devices = max(1, gpus * nodes)
        config = config.model_copy(update={"batch_tokens": config.batch_tokens * devices})
    with ProgressReporter() as progress:
        made = plan(config, gpu=gpu, gpus=gpus, nodes=nodes, progress=progress)
    if json_output:
        print_json(_result(made, price))
    else:
        _show(made, price)


def _result(made: Plan, price: float | None) -> dict[str, Any]:
    from supra_torch.plan.quality import nearest

    measured = nearest(made.config.recipe, made.config.tokens)
    return {
        "settings": made.config.model_dump(mode="json"),
        "device": made.device.name,
        "gpus": made.gpus,
        "nodes": made.nodes,
        "precision": made.precision,
        "stages": [
            {
                **{name: getattr(stage, name) for name in _STAGE},
                "memory_bytes": stage.parts,
                "peak_bytes": stage.bytes,
                "tokens_per_second": stage.step_tokens / stage.step_seconds,
                "most_tokens_per_second": stage.step_tokens / stage.least_step_seconds,
            }
            for stage in made.stages
        ],
        "peak_bytes": made.bytes,
        "device_bytes": made.device_bytes,
        "fits": made.fits,
        "remedy": made.remedy,
        **{name: getattr(made, name) for name in ("seconds", "least_seconds", "device_hours")},
        "cost": None if price is None else made.device_hours * price,
        "checkpoint_bytes": made.checkpoint_bytes,
        **{name: getattr(made.student, name) for name in _STUDENT},
        "transformer_windows": list(made.student.transformer_windows),
        "measured_quality": None if measured is None else asdict(measured),
    }


def _show(made: Plan, price: float | None) -> None:
    from supra_cli.shared.output import print_table
    from supra_torch.plan.plan import in_order

    stages = made.stages
    rows = [
        (_PARTS[part], *(_gigabytes(stage.parts.get(part, 0)) for stage in stages))
        for part in in_order(stages)
    ]
    rows.append(("all", *(_gigabytes(stage.bytes) for stage in stages)))
    print_table(
        rows,
        columns=("peak GB per device", *(stage.kind for stage in stages)),
        title=f"{Path(made.config.model).name} by {made.config.recipe}: {_where(made)}",
    )
    print_table(
        [
            (
                stage.kind,
                f"{stage.steps:,}",
                f"{stage.step_tokens:,}",
                f"{stage.step_seconds:.3g}",
                f"{stage.step_tokens / stage.step_seconds:,.0f}",
                f"{stage.step_tokens / stage.least_step_seconds:,.0f}",
            )
            for stage in stages
        ],
        columns=("stage", "steps", "tokens/step", "s/step", "tokens/s", "at peak"),
    )
    print_table(_summary(made, price))


def _summary(made: Plan, price: float | None) -> list[tuple[str, str]]:
    from supra_cli.shared.output import bytes_text, cache_text
    from supra_core.progress import duration

    student, device_bytes = made.student, made.device_bytes
    hours = f"{made.device_hours:,.3g} device hours"
    if not made.fits:
        hours += ", if it fitted"
    rows = [
        ("memory", f"{_gigabytes(made.bytes)} of {_gigabytes(device_bytes)} GB: {_verdict(made)}"),
        ("time", f"{duration(made.seconds)}; {duration(made.least_seconds)} at the device's peak"),
        ("cost", hours if price is None else f"{made.device_hours * price:,.2f} for {hours}"),
        ("checkpoint", f"{_gigabytes(made.checkpoint_bytes)} GB on disk"),
        ("model", _parameters(student)),
        ("state", bytes_text(student.state_bytes) + " per sequence, at any context length"),
    ]
    if student.growing_bytes_per_token:
        rows.append(("cache", bytes_text(student.growing_bytes_per_token) + " per token"))
    cache = cache_text(student)
    if student.break_even_tokens is not None:
        cache += f", more than the state from {student.break_even_tokens:,} tokens on"
    return [*rows, ("transformer's cache", cache), ("quality", _quality(made))]


def _parameters(student: Sizes) -> str:
    """All parameters, and the active ones of a mixture of experts."""
    text = f"{student.parameters:,} parameters"
    if student.active_parameters == student.parameters:
        return text
    return f"{text}, {student.active_parameters:,} of them active per token"


def _quality(made: Plan) -> str:
    from supra_torch.plan.quality import nearest

    run = nearest(made.config.recipe, made.config.tokens)
    if run is None:
        return f"not predicted; no run with {made.config.recipe} was measured"
    return (
        f"not predicted; {run.model} after {run.tokens:,} tokens: perplexity {run.outside:g} x the "
        f"transformer's outside the training domain, {run.inside:g} x inside"
    )


def _verdict(made: Plan) -> str:
    if made.fits:
        return "fits"
    if made.remedy is None:
        return "does not fit: use more or larger devices, or shorter sequences"
    settings = " ".join(f"--set {name}={str(value).lower()}" for name, value in made.remedy.items())
    return f"does not fit, but with {settings}"


def _where(made: Plan) -> str:
    many = f"{made.gpus} x " if made.gpus > 1 else ""
    nodes = f"{made.nodes} nodes of " if made.nodes > 1 else ""
    return f"{nodes}{many}{made.device.name}, {made.precision}"


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:,.2f}"
