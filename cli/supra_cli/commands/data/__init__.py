"""``supra data``: training text, one module per subcommand."""

from __future__ import annotations

import typer

from supra_cli.commands.data import prepare, synthesize

app = typer.Typer(no_args_is_help=True, help="Prepare or generate training text.")
app.command("prepare")(prepare.command)
app.command("synthesize")(synthesize.command)
