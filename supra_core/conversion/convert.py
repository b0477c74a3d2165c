"""A source of any format to an output of any format, linearized and folded on the way."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from math import prod
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
from supra_core.mixers import PRESETS
from supra_core.mixers.positions import LongropeScaling, RopeFactors
from supra_core.model.layout import parameter_count
from supra_core.model.original import left_out
from supra_core.model.spec import ModelSpec
from supra_core.progress import Progress, silent
from supra_core.sources.source import WRITERS, Source, open_source
from supra_core.tensors import LazyTensor, TensorSource, dtype_named
from supra_core.text import TOKENIZER

# Norms and vectors are less than the rest.
_MOST_PACKED = 0.95


class Calibrate(Protocol):
    """Fits a linearized model to its transformer; a backend offers one."""

    def __call__(
        self, teacher: Source, spec: ModelSpec, tensors: TensorSource, progress: Progress
    ) -> tuple[int, dict[str, LazyTensor]]:
        """The number of tokens used, and the tensors to replace."""
        ...


class Quantise(Protocol):
    """Quantises a model's matrices; a backend offers one."""

    def __call__(self, spec: ModelSpec, tensors: TensorSource, dtype: str) -> Packed:
        """What to write instead of ``tensors``; what is not quantised is stored in ``dtype``."""
        ...


@dataclass(frozen=True)
class ConversionRequest:
    """What to convert, to what, and how; SupraError for choices that cannot be met.

    ``source``, ``config``, ``revision``, ``offline``: as in :func:`open_source`; ``opened`` is
    that source once :meth:`open` has opened it. ``out``: the folder to write; ``force`` replaces
    an earlier conversion. ``linearize`` None linearizes a transformer on its way to ``supra``, and
    any source if ``options`` are given. ``calibrate`` fits what was linearized. ``fold``: multiply
    feature maps into q and k. ``quantise`` packs what is written. ``dtype`` None keeps the
    source's. ``rope_factors``: the ``short`` or ``long`` factors of a longrope model.
    """

    source: str | Path
    out: str | Path
    to: str = "supra"
    linearize: bool | None = None
    options: LinearizeOptions | None = None
    calibrate: Calibrate | None = None
    fold: bool = False
    quantise: Quantise | None = None
    dtype: str | None = None
    rope_factors: str | None = None
    force: bool = False
    config: Path | None = None
    revision: str | None = None
    offline: bool = False
    opened: Source | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, known in (("to", tuple(WRITERS)), ("rope_factors", get_args(RopeFactors))):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise SupraError(f"`{name}` '{value}' is unknown: use one of {', '.join(known)}")
        if self.dtype is not None:
            dtype_named(self.dtype)
        if self.linearize is False and self.options is not None:
            raise SupraError(
                "`linearize=False` contradicts the choices of how to linearize: omit one of them"
            )
        if self.calibrate is not None and (self.to != "supra" or self.fold):
            raise SupraError(
                "a model can be calibrated only if it is converted with `to=supra` and without "
                "`fold`: omit `calibrate`, or convert in two steps"
            )
        if self.quantise is not None and self.to != "supra":
            raise SupraError(f"`quantise` needs `to=supra`: omit it for `to={self.to}`")
        places = self.source, self.out
        if all(map(os.path.exists, places)) and os.path.samefile(*places):
            raise SupraError(f"{self.out} is the source itself: choose another folder")
        check_replaceable(self.out, self.force, holds=artifact.CONFIG)
        if self.opened is not None and self.calibrate is not None and not self.linearizes:
            raise SupraError(
                f"{self.source} is not linearized here, so it cannot be calibrated: omit "
                "`calibrate` and `calibration_text`, or start from the transformer"
            )
        if self.calibrate is not None and not PRESETS[self._preset].can_calibrate:
            raise SupraError(
                f"the preset {self._preset} has nothing to calibrate: omit `calibrate` and "
                "`calibration_text`"
            )

    def open(self, progress: Progress = silent) -> ConversionRequest:
        """The request with its source opened; no weights are read."""
        if self.opened is not None:
            return self
        found = open_source(
            self.source, config=self.config, revision=self.revision, offline=self.offline,
            progress=progress,
        )  # fmt: skip
        if self.rope_factors is not None:
            spec = with_factors(found.spec, self.rope_factors, str(self.source))
            found = replace(found, spec=spec)
        return replace(self, opened=found)

    @property
    def found(self) -> Source:
        """The opened source."""
        assert self.opened is not None
        return self.opened

    @property
    def linearizes(self) -> bool:
        """Whether the opened source is linearized."""
        if self.linearize is None:
            automatic = self.found.spec.is_transformer and self.to == "supra"
            return automatic or self.options is not None
        return self.linearize

    @property
    def is_calibrated_by_default(self) -> bool:
        """Whether the opened source gains from a calibration."""
        transformer = self.to == "supra" and self.linearizes and self.found.spec.is_transformer
        return transformer and PRESETS[self._preset].presets[self._preset]

    @property
    def _preset(self) -> str:
        return (self.options or LinearizeOptions()).preset


@dataclass(frozen=True)
class Conversion:
    """What was done. ``kind`` is the source's format, ``dtype`` the weights' type.

    ``left_out``: what the transformer has and its linear layers cannot have; ``notes``: what else
    the user should know; both one sentence each. ``not_finite``: names of tensors with NaN or
    infinity.
    """

    spec: ModelSpec
    kind: str
    dtype: str
    linearized: bool
    folded: bool
    left_out: tuple[str, ...]
    not_finite: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def calibrated(self) -> bool:
        """Whether the model is calibrated, here or before."""
        return bool(self.spec.provenance.calibration_tokens)


def with_factors(spec: ModelSpec, factors: str, where: str) -> ModelSpec:
    """A longrope model that uses its ``short`` or ``long`` factors."""
    scaling = spec.rope.scaling
    if not isinstance(scaling, LongropeScaling):
        raise SupraError(f"{where} has no longrope scaling: omit `rope_factors`")
    scaling = replace(scaling, factors=cast(RopeFactors, factors))
    return replace(spec, rope=replace(spec.rope, scaling=scaling))


def convert(request: ConversionRequest, progress: Progress = silent) -> Conversion:
    """Write the model, whole or not at all; :class:`SupraError` for bad input."""
    request = request.open(progress)
    source = request.found
    # Damaged tokenizers and matrices that cannot be packed are noticed before the long work.
    assets = source.assets()
    notes = (*source.notes, *_without_embedding(source))
    spec, tensors = source.spec, dict(source.tensors)
    if request.linearizes:
        spec, new = linearizing.linearize(spec, tensors, request.options or LinearizeOptions())
        tensors = dict(new)
    dtype = request.dtype or source.dtype
    if request.quantise is not None:
        request.quantise(spec, tensors, dtype)
    originals: dict[str, LazyTensor] = {}
    if request.calibrate is not None:
        _require_finite(source, request.source)
        used, changed = request.calibrate(source, spec, tensors, progress)
        originals = {name: tensors[name] for name in artifact.replaced_by_calibrating(spec)}
        spec = replace(spec, provenance=replace(spec.provenance, calibration_tokens=used))
        tensors |= changed
    if request.fold:
        spec, new = folding.fold(spec, tensors)
        tensors = dict(new)
    write, watch = WRITERS[request.to], Watch()
    tensors = watch.over(tensors)
    if request.quantise is not None:
        packed = request.quantise(spec, tensors, dtype)
        write = partial(artifact.write, packed=packed)
        notes = (*notes, *_unpacked(spec, tensors, packed, dtype))
    elif originals:
        write = partial(artifact.write, originals=originals)
    write(
        request.out, spec, tensors, assets, force=request.force, dtype=dtype,
        progress=partial(progress, "write"),
    )  # fmt: skip
    without = left_out(spec) if request.linearizes else ()
    return Conversion(
        spec, source.kind, dtype, request.linearizes, request.fold, without, watch.found, notes
    )


def _unpacked(spec: ModelSpec, tensors: TensorSource, packed: Packed, dtype: str) -> Iterator[str]:
    """A note if more than norms and the like are left unquantised."""
    count = sum(prod(tensors[f"{name}.weight"].shape) for name in packed.modules)
    share = count / parameter_count(spec)
    if share < _MOST_PACKED:
        yield (
            f"{share:.0%} of the parameters are quantised: matrices whose rows are not a multiple "
            f"of 64 numbers stay {dtype}"
        )


def _without_embedding(source: Source) -> Iterator[str]:
    """A note if the tokenizer, or some of its tokens, cannot be used with the model."""
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
            "model again, or convert it with `calibrate=None`"
        )
