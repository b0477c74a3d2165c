"""``supra data``: text to train on, one module a subcommand."""

from __future__ import annotations

import typer

from supra_cli.commands.data import synthesize

app = typer.Typer(no_args_is_help=True, help="Make text to train on.")


@app.callback()
def _group() -> None:
    """Keeps the subcommand's name, as long as there is only one."""


app.command("synthesize")(synthesize.command)
