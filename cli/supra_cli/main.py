"""The command ``supra``: registers the commands and turns errors into exit codes.

Nothing heavy is imported here, so that ``supra --help`` is quick and works without any backend;
each command imports what it needs when it runs.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from supra_cli.commands import (
    bench,
    chat,
    convert,
    data,
    demo,
    doctor,
    evaluate,
    generate,
    inspect,
    launch,
    plan,
    push,
    report,
    serve,
    state,
    uptrain,
    verify,
)
from supra_cli.shared.flags import flags_of, with_flags
from supra_cli.shared.output import libraries_visible, log, log_failure
from supra_core.errors import EndedByAnother, Preempted, SupraError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
# EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again.
EXIT_START_AGAIN = 75
# What typer itself ends a command by; the last is the error of a wrong command line.
_ENDS = (typer.Exit, typer.Abort, *typer.BadParameter.__bases__)


class SupraGroup(TyperGroup):
    """Bad input ends in one sentence and exit code 2, Ctrl-C in 130, SIGTERM with
    everything saved in 75, none in a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with libraries_visible():
                done = super().invoke(ctx)
            if _is_of_torchrun():
                _end(0)
            return done
        except EndedByAnother:
            _end(EXIT_BAD_INPUT)
        except SupraError as error:
            flags = flags_of(ctx.command.get_command(ctx, ctx.invoked_subcommand))
            log(f"supra: error: {with_flags(str(error), flags)}")
            _end(EXIT_BAD_INPUT)
        except KeyboardInterrupt:
            log("", "supra: interrupted")
            _end(EXIT_INTERRUPTED)
        except Preempted:
            log("supra: stopped by SIGTERM; progress is saved. Run the same command to resume.")
            _end(EXIT_START_AGAIN)
        except Exception as error:
            # A broken pipe is left to typer: who read the output has gone, and wants no word.
            if isinstance(error, OSError) and error.errno != errno.EPIPE:
                log(f"supra: error: {SupraError(_refused(error))}")
                _end(EXIT_BAD_INPUT)
            if isinstance(error, (OSError, *_ENDS)) and not _is_joined():
                raise
            log_failure(error)
            _end(1)


def _refused(error: OSError) -> str:
    """What the system would not do, where no command foresaw it, as a sentence."""
    from supra_core.errors import reason

    if isinstance(error.filename, str | bytes):
        place = os.fsdecode(error.filename)
        return f"{place} could not be used ({reason(error)}): check the path and its permissions"
    return f"the system did not do what was asked ({reason(error)}): mend that and start again"


def _end(code: int) -> NoReturn:
    """End with an exit code; at once where this process belongs, or belonged, to a group of others.

    A GPU's group is left only when all leave it, and the others may wait for this process. What is
    left of a group of gloo aborts the process now and then while Python takes itself down.
    """
    if _is_joined() or _is_of_torchrun():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code) from None


def _is_of_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and "torch.distributed" in sys.modules


def _is_joined() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return bool(distributed and distributed.is_available() and distributed.is_initialized())


app = typer.Typer(
    cls=SupraGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Turn pretrained transformers into recurrent networks, and run them.",
)

app.command("convert")(convert.command)
app.command("push")(push.command)
app.command("inspect")(inspect.command)
app.command("verify")(verify.command)
app.command("plan")(plan.command)
app.command("uptrain")(uptrain.command)
app.command("eval")(evaluate.command)
app.command("report")(report.command)
app.command("generate")(generate.command)
app.command("chat")(chat.command)
app.command("serve")(serve.command)
app.command("doctor")(doctor.command)
app.command("demo")(demo.command)
app.add_typer(bench.app, name="bench", cls=SupraGroup)
app.add_typer(data.app, name="data", cls=SupraGroup)
app.add_typer(launch.app, name="launch", cls=SupraGroup)
app.add_typer(state.app, name="state", cls=SupraGroup)
