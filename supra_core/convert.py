"""A source of any format to an output of any format, linearized and folded on the way."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from supra_core import fold as folding
from supra_core import linearize as linearizing
from supra_core.errors import SupraError
from supra_core.linearize import LinearizeOptions
from supra_core.progress import Progress, silent
from supra_core.sources import WRITERS, open_source
from supra_core.spec import ModelSpec

TARGETS = tuple(WRITERS)


@dataclass(frozen=True)
class Conversion:
    """What was done. ``kind`` is the source's format, ``dtype`` the weights' type."""

    spec: ModelSpec
    kind: str
    dtype: str
    linearized: bool
    folded: bool


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "supra",
    linearize: bool | None = None,
    options: LinearizeOptions | None = None,
    fold: bool = False,
    dtype: str | None = None,
    force: bool = False,
    config: Path | None = None,
    progress: Progress = silent,
) -> Conversion:
    """Write the model at ``source`` to ``out``, whole or not at all.

    ``linearize`` None linearizes a plain transformer on its way to ``supra``, and whatever
    ``options`` are given for; a model that is linear already stays as it is. ``dtype`` None keeps
    the source's. Raises :class:`SupraError` for bad input and impossible choices.
    """
    if to not in WRITERS:
        raise SupraError(f"--to '{to}' is unknown: use one of {', '.join(TARGETS)}")
    if linearize is False and options is not None:
        raise SupraError(
            "--no-linearize contradicts the choices of how to linearize: leave one of them out"
        )
    found = open_source(source, config=config)
    spec, tensors = found.spec, dict(found.tensors)
    wanted = linearize
    if wanted is None:
        wanted = options is not None or (spec.is_transformer and to == "supra")
    if wanted:
        new_spec, new_tensors = linearizing.linearize(spec, tensors, options or LinearizeOptions())
        spec, tensors = new_spec, dict(new_tensors)
    if fold:
        new_spec, new_tensors = folding.fold(spec, tensors)
        spec, tensors = new_spec, dict(new_tensors)
    stored = dtype or found.dtype
    WRITERS[to](
        out,
        spec,
        tensors,
        found.assets(),
        force=force,
        dtype=stored,
        progress=lambda done, total: progress("write", done, total),
    )
    return Conversion(spec, found.kind, stored, wanted, fold)
