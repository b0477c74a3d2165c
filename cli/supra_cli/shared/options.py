"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OpenLMConfig = Annotated[
    Path | None,
    typer.Option("--config", help="Config of an OpenLM checkpoint that has none beside it."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout; logs go to stderr.")
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16 or float16; default: the type the weights have."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Private = Annotated[bool, typer.Option("--private", help="Create the repository as private.")]
ReportFolder = Annotated[
    Path | None, typer.Option("--out", help="Folder for the result as JSON and as markdown.")
]
Form = Annotated[str, typer.Option(help="parallel, recurrent or step.")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling: keep this much probability.")]
MinP = Annotated[
    float, typer.Option(help="Drop tokens with less than this share of the likeliest's chance.")
]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1 repeats less; 1 is none.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="End an answer before this text; may be repeated.")
]
MaxTokens = Annotated[int, typer.Option(help="Stop after this many tokens.")]
Seed = Annotated[int | None, typer.Option(help="Seed for repeatable sampling.")]
ParseMarkers = Annotated[
    bool,
    typer.Option(
        "--parse-markers",
        help="Parse chat markers in messages, such as <|im_end|>, instead of taking them as text.",
    ),
]
State = Annotated[
    Path | None, typer.Option(help="Continue from a file of /save or supra state read.")
]
System = Annotated[str | None, typer.Option(help="System prompt; default: the template's own.")]
GenerationBackend = Annotated[
    str | None, typer.Option(help="mlx or torch; default: mlx where it is installed.")
]


def overrides(settings: list[str]) -> dict[str, str]:
    """What several ``--set KEY=VALUE`` say; :class:`SupraError` if one is no setting."""
    from supra_core.errors import SupraError

    values = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise SupraError(f"--set {setting} is no setting: write key=value")
        values[key.strip()] = value.strip()
    return values
