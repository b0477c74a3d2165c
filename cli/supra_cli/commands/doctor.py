"""``supra doctor``."""

from __future__ import annotations

from supra_cli import options


def command(json_output: options.Json = False) -> None:
    """Say what this machine can run, and what to install."""
    from supra_cli.doctor import advice, examine
    from supra_cli.output import log, print_json, print_table

    found = examine()
    hints = advice(found)
    if json_output:
        print_json({**found, "advice": hints})
        return
    print_table((name.replace("_", " "), _text(value)) for name, value in found.items())
    for hint in hints:
        log(hint)


def _text(value: object) -> str:
    if value is None:
        return "no"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
