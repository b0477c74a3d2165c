"""A source of any format to an output of any format, linearized and folded on the way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol, cast, get_args

from supra_core.artifact import folder as artifact
from supra_core.conversion import fold as folding
from supra_core.conversion import linearize as linearizing
from supra_core.conversion.linearize import LinearizeOptions
from supra_core.errors import SupraError
from supra_core.formats.atomic import check_replaceable
from supra_core.formats.finite import Watch, first_not_finite
from supra_core.formats.mlx_quantized import Packed
from supra_core.mixers.positions import LongropeScaling, RopeFactors
from supra_core.model.original import left_out
from supra_core.model.spec import ModelSpec
from supra_core.progress import Progress, silent
from supra_core.sources.source import WRITERS, Source, open_source
from supra_core.tensors import LazyTensor, TensorSource, dtype_named
from supra_core.text import TOKENIZER

TARGETS = tuple(WRITERS)


@dataclass(frozen=True)
class Conversion:
    """What was done. ``kind`` is the source's format, ``dtype`` the weights' type.

    ``left_out``: what the transformer has and its linear layers cannot, ``notes``: what else the
    user should know, one sentence each. ``not_finite``: tensors with NaN or infinity, by name.
    """

    spec: ModelSpec
    kind: str
    dtype: str
    linearized: bool
    calibrated: bool
    folded: bool
    left_out: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def with_factors(spec: ModelSpec, factors: str, where: str) -> ModelSpec:
    """A model of longrope that turns by its ``short`` or ``long`` factors."""
    _require_known(factors)
    scaling = spec.rope.scaling
    if not isinstance(scaling, LongropeScaling):
        raise SupraError(f"{where} has no longrope scaling: leave out --rope-factors")
    scaling = replace(scaling, factors=cast(RopeFactors, factors))
    return replace(spec, rope=replace(spec.rope, scaling=scaling))


def _require_known(factors: str) -> None:
    if factors not in get_args(RopeFactors):
        raise SupraError(f"--rope-factors '{factors}' is unknown: use short or long")


class Calibrate(Protocol):
    """Fits a linearized model to its transformer; a backend offers one."""

    def __call__(
        self, teacher: Source, spec: ModelSpec, tensors: TensorSource, progress: Progress
    ) -> tuple[int, dict[str, LazyTensor]]:
        """The number of tokens that were used, and the tensors that are to be others."""
        ...


class Quantise(Protocol):
    """Packs a model's matrices; a backend offers one."""

    def __call__(self, spec: ModelSpec, tensors: TensorSource, dtype: str) -> Packed:
        """What is written in the place of ``tensors``, the rest in ``dtype``."""
        ...


def convert(
    source: str | Path,
    out: str | Path,
    *,
    to: str = "supra",
    linearize: bool | None = None,
    options: LinearizeOptions | None = None,
    calibrate: Calibrate | None = None,
    fold: bool = False,
    quantise: Quantise | None = None,
    dtype: str | None = None,
    force: bool = False,
    config: Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    rope_factors: str | None = None,
    progress: Progress = silent,
) -> Conversion:
    """Write the model at ``source`` to ``out``, whole or not at all.

    ``linearize`` None linearizes a plain transformer on its way to ``supra``, and whatever
    ``options`` are given for; a model that is linear already stays as it is. ``calibrate`` fits
    what was linearized before it is written; ``quantise`` packs what is written. ``dtype`` None
    keeps the source's. ``revision``, ``offline``: of a source on the hub. ``rope_factors``: which
    of longrope's, ``short`` or ``long``, the model turns by.
    Raises :class:`SupraError` for bad input and impossible choices.
    """
    if to not in WRITERS:
        raise SupraError(f"--to '{to}' is unknown: use one of {', '.join(TARGETS)}")
    if linearize is False and options is not None:
        raise SupraError(
            "--no-linearize contradicts the choices of how to linearize: leave one of them out"
        )
    if calibrate is not None and (to != "supra" or fold):
        raise SupraError(
            "a model can be calibrated on its way to --to supra without --fold only: leave "
            "--calibrate out, or convert in two steps"
        )
    if quantise is not None and to != "supra":
        raise SupraError(f"--quantize goes with --to supra only: leave it out for --to {to}")
    if os.path.exists(source) and os.path.exists(out) and os.path.samefile(source, out):
        raise SupraError(f"{out} is the source itself: choose another folder")
    check_replaceable(out, force, holds=artifact.CONFIG)
    if dtype is not None:
        dtype_named(dtype)
    if rope_factors is not None:
        _require_known(rope_factors)
    found = open_source(
        source, config=config, revision=revision, offline=offline, progress=progress
    )
    if rope_factors is not None:
        found = replace(found, spec=with_factors(found.spec, rope_factors, str(source)))
    spec, tensors = found.spec, dict(found.tensors)
    # A tokenizer that cannot be had is noticed before the minutes that the rest may take.
    assets = found.assets()
    notes = (*found.notes, *_without_embedding(found))
    wanted = linearize
    if wanted is None:
        wanted = options is not None or (spec.is_transformer and to == "supra")
    if calibrate is not None and not wanted:
        raise SupraError(
            f"{source} is not linearized here, and only what is can be calibrated: leave out "
            "--calibrate and --calibration-text, or start from the transformer"
        )
    if wanted:
        new_spec, new_tensors = linearizing.linearize(spec, tensors, options or LinearizeOptions())
        spec, tensors = new_spec, dict(new_tensors)
    stored = dtype or found.dtype
    if quantise is not None:
        # What cannot be packed is noticed before the minutes that calibrating takes.
        quantise(spec, tensors, stored)
    originals: dict[str, LazyTensor] = {}
    if calibrate is not None:
        _require_finite(found, source)
        used, changed = calibrate(found, spec, tensors, progress)
        originals = {name: tensors[name] for name in artifact.replaced_by_calibrating(spec)}
        spec = replace(spec, provenance=replace(spec.provenance, calibration_tokens=used))
        tensors |= changed
    if fold:
        new_spec, new_tensors = folding.fold(spec, tensors)
        spec, tensors = new_spec, dict(new_tensors)
    write = WRITERS[to]
    watch = Watch()
    tensors = watch.over(tensors)
    if quantise is not None:
        write = partial(artifact.write, packed=quantise(spec, tensors, stored))
    elif originals:
        write = partial(artifact.write, originals=originals)
    write(
        out,
        spec,
        tensors,
        assets,
        force=force,
        dtype=stored,
        progress=lambda done, total: progress("write", done, total),
    )
    return Conversion(
        spec, found.kind, stored, wanted, bool(spec.provenance.calibration_tokens), fold,
        left_out(spec) if wanted else (), watch.found,
        notes,
    )  # fmt: skip


def _without_embedding(source: Source) -> Iterator[str]:
    """What to tell of a tokenizer, or of tokens of it, that the model cannot be used with."""
    if TOKENIZER not in source.assets():
        return
    try:
        beyond = source.tokenizer().beyond()
    except SupraError as error:
        yield str(error)
        return
    if beyond:
        names = [f"'{token}' ({ident})" for ident, token in islice(beyond.items(), 3)]
        more = f" and {len(beyond) - 3:,} more" if len(beyond) > 3 else ""
        yield (
            f"the tokenizer has {', '.join(names)}{more}, and the model has embeddings for "
            f"{source.spec.vocab_size:,} tokens only: text with such a token is refused"
        )


def _require_finite(source: Source, where: str | Path) -> None:
    """Calibrating would spread one such number over a whole layer."""
    name = first_not_finite(source.tensors)
    if name is not None:
        raise SupraError(
            f"{where}: {name} holds NaN or infinity, with which nothing can be calibrated: get the "
            "model again, or convert it as it is with --no-calibrate"
        )
