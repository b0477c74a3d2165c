"""``supra doctor``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from supra_cli.shared import options
from supra_cli.shared.output import log, print_json, print_table

EXIT_CHECK_FAILED = 1


def command(
    deep: Annotated[
        bool, typer.Option("--deep", help="Also run the GPU kernels of MLX and compare them.")
    ] = False,
    json_output: options.Json = False,
) -> None:
    """Say what this machine can run, and what to install."""
    from supra_cli.shared.doctor import advice, examine, kernels

    found = examine()
    hints = advice(found)
    compared = kernels() if deep else None
    if json_output:
        print_json({**found, "advice": hints} | ({"kernels": compared} if deep else {}))
    else:
        print_table((name.replace("_", " "), _text(value)) for name, value in found.items())
        for hint in hints:
            log(hint)
        if deep:
            _show(compared)
    if compared and not all(row["passed"] for row in compared):
        raise typer.Exit(EXIT_CHECK_FAILED)


def _show(compared: list[dict[str, Any]] | None) -> None:
    if compared is None:
        log("This machine has no Metal, so there is no kernel to compare.")
        return
    print_table(
        [
            (
                " x ".join(map(str, row["shape"])),
                f"{row['difference']:.1e}",
                "yes" if row["passed"] else "no",
                f"{row['kernel_seconds'] * 1e6:,.0f}",
                f"{row['ops_seconds'] * 1e6:,.0f}",
            )
            for row in compared
        ],
        columns=("heads, key heads, features, values", "difference", "agrees", "µs", "without, µs"),
        title="The Metal kernel beside the operations it replaces",
    )
    if all(row["passed"] for row in compared):
        log("The kernel agrees: set SUPRA_METAL=1 to use it.")
    else:
        log("The kernel does not agree: do not set SUPRA_METAL, and please report this table.")


def _text(value: object) -> str:
    if value is None:
        return "no"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
