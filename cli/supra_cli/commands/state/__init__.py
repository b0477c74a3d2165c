"""``supra state``: files that a conversation goes on from, one module a subcommand."""

from __future__ import annotations

import typer

from supra_cli.commands.state import info, read

app = typer.Typer(no_args_is_help=True, help="Files that a conversation goes on from.")
app.command("read")(read.command)
app.command("info")(info.command)
