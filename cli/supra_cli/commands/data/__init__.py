"""``supra data``: text to train on, one module a subcommand."""

from __future__ import annotations

import typer

from supra_cli.commands.data import prepare, synthesize

app = typer.Typer(no_args_is_help=True, help="Make text to train on, or tokens of it.")
app.command("prepare")(prepare.command)
app.command("synthesize")(synthesize.command)
