"""``supra state``: saved conversation states, one module per subcommand."""

from __future__ import annotations

import typer

from supra_cli.commands.state import info, read

app = typer.Typer(no_args_is_help=True, help="Save and inspect conversation states.")
app.command("read")(read.command)
app.command("info")(info.command)
