"""``supra bench``: measurements, one module per subcommand."""

from __future__ import annotations

import typer

from supra_cli.commands.bench import context, decode, op, train

app = typer.Typer(no_args_is_help=True, help="Measure speed and memory on this machine.")
app.command("op")(op.command)
app.command("decode")(decode.command)
app.command("context")(context.command)
app.command("train")(train.command)
