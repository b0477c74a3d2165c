"""``supra convert``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supra_cli.shared import options

if TYPE_CHECKING:
    from supra_core.conversion.convert import Calibrate, Quantise
    from supra_core.conversion.linearize import LinearizeOptions
    from supra_core.hub import HubId
    from supra_core.sources.source import Source


def command(
    source: Annotated[str, typer.Argument(help="Hub id, folder, .gguf or OpenLM checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="supra, hf or openlm.")] = "supra",
    linearize: Annotated[
        bool | None,
        typer.Option(
            "--linearize/--no-linearize",
            help="Default: linearize a plain transformer on its way to supra.",
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="windowed (default), pure, or paper, the published model.")
    ] = None,
    feature_map: Annotated[
        str | None, typer.Option(help="relu, signed_relu, signed_softmax or none.")
    ] = None,
    decay: Annotated[str | None, typer.Option(help="lightning, retnet, none or learned.")] = None,
    output_norm: Annotated[str | None, typer.Option(help="group_norm, sum or sum_sink.")] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens that keep softmax weights; windowed: 128.")
    ] = None,
    keep_softmax: Annotated[
        str | None, typer.Option(help="Layers that stay as they are, as in 0,15.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random weights of the paper recipe.")] = 0,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Fit what is linearized to the transformer without training. Default: where "
            "torch is installed, but for the paper recipe.",
        ),
    ] = None,
    calibration_text: Annotated[
        Path | None,
        typer.Option(help="Text to calibrate on; default: Python's own documentation."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of it to use.")] = 16_384,
    dtype: options.Dtype = None,
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="Multiply feature maps into q and k.")
    ] = False,
    quantize: Annotated[
        int | None,
        typer.Option(help="Bits of the matrices, 4, 6 or 8, for MLX; some get two more."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="Config of an OpenLM checkpoint that has none beside it.")
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a hub id; the same as org/name@REVISION."),
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Take a hub id from the cache, or not at all.")
    ] = False,
    rope_factors: Annotated[
        str | None,
        typer.Option(
            help="Of longrope (Phi-3 128k): short (default), as for texts of up to the original "
            "length, or long, as for longer ones."
        ),
    ] = None,
    push_to: Annotated[
        str | None, typer.Option(help="Hub id to put OUT on when it is written.")
    ] = None,
    private: options.Private = False,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Convert a model, and linearize it on the way."""
    from supra_cli.shared import pushing
    from supra_cli.shared.output import log, print_json
    from supra_cli.shared.progress import ProgressReporter
    from supra_core.conversion.convert import convert
    from supra_core.errors import SupraError
    from supra_core.formats.atomic import check_replaceable
    from supra_core.model.layout import parameter_count
    from supra_core.sources.source import open_source
    from supra_core.tensors import dtype_named

    chosen = _linearize_options(seed, recipe, feature_map, decay, output_norm, window, keep_softmax)
    start = time.monotonic()
    # Before the source is opened, which for some takes a while.
    check_replaceable(out, force)
    if dtype is not None:
        dtype_named(dtype)
    pack = None if quantize is None else _quantisation(quantize)
    if private and push_to is None:
        raise SupraError("--private goes with --push-to: name where to, or leave it out")
    target = None
    if push_to is not None:
        target = pushing.target(push_to, source=source, offline=offline)
    possible = to == "supra" and recipe != "paper" and linearize is not False
    with ProgressReporter() as progress:
        read = partial(
            open_source, source, config=config, revision=revision, offline=offline,
            progress=progress,
        )  # fmt: skip
        fit = _calibration(
            source, read, calibrate, possible, fold, calibration_text, calibration_tokens
        )
        done = convert(
            source, out, to=to, linearize=linearize, options=chosen, calibrate=fit, fold=fold,
            quantise=pack, dtype=dtype, force=force, config=config, revision=revision,
            offline=offline, rope_factors=rope_factors, progress=progress,
        )  # fmt: skip
    if quantize is not None:
        packed = _packed_share(out)
        if packed < _MOST:
            log(
                f"note: {packed:.0%} of the parameters are packed: what has rows of no multiple of "
                f"64 numbers stays {done.dtype}"
            )
    for sentence in done.notes:
        log(f"note: {sentence}")
    if done.not_finite:
        more = f" and {len(done.not_finite) - 3} more" if len(done.not_finite) > 3 else ""
        log(
            f"warning: there is NaN or infinity in {', '.join(done.not_finite[:3])}{more}, and so "
            "will be in the answers: get the model again"
        )
    pushed = None if target is None else _pushed(out, target, private)
    layer_types = [layer.mixer.layer_type for layer in done.spec.layers]
    if json_output:
        print_json(
            {
                "source": source,
                "source_kind": done.kind,
                "out": str(out),
                "to": to,
                "linearized": done.linearized,
                "calibrated": done.calibrated,
                "calibration_tokens": done.spec.provenance.calibration_tokens,
                "folded": done.folded,
                "quantized": quantize,
                "recipe": done.spec.provenance.recipe,
                "dtype": done.dtype,
                "parameters": parameter_count(done.spec),
                "layer_types": layer_types,
                "left_out": list(done.left_out),
                "not_finite": list(done.not_finite),
                "notes": list(done.notes),
                "stated_source": done.spec.provenance.source,
                "pushed": pushed,
                "seconds": round(time.monotonic() - start, 2),
            }
        )
        return
    kinds = ", ".join(f"{layer_types.count(kind)} {kind}" for kind in dict.fromkeys(layer_types))
    stored = done.dtype if quantize is None else f"{quantize} bits and what stays {done.dtype}"
    log(f"{out}: {parameter_count(done.spec):,} parameters in {stored}, layers: {kinds}")
    for sentence in done.left_out:
        log(f"note: {sentence}")


def _pushed(out: Path, target: HubId, private: bool) -> dict[str, Any]:
    from supra_cli.shared import pushing
    from supra_core.errors import SupraError

    try:
        return pushing.push(out, target, private)
    except SupraError as error:
        raise SupraError(
            f"{error}; {out} is written and whole: supra push {out} {target}"
        ) from None


# Norms and what else is no matrix are less than the rest.
_MOST = 0.95


def _packed_share(out: Path) -> float:
    """How many of the parameters that were just written are in quantised matrices."""
    from supra_core.model.layout import parameter_count
    from supra_core.sources.source import open_source

    written = open_source(out)
    modules = {} if written.packed is None else written.packed.modules
    packed = sum(prod(written.tensors[f"{name}.weight"].shape) for name in modules)
    return packed / parameter_count(written.spec)


def _quantisation(bits: int) -> Quantise:
    from supra_core.runtime.backend import importing

    with importing("mlx", "quantising"):
        from supra_mlx.quantize import check_bits, quantised

    check_bits(bits)
    return partial(quantised, bits=bits)


def _calibration(
    source: str,
    read: Callable[[], Source],
    wanted: bool | None,
    possible: bool,
    fold: bool,
    text: Path | None,
    tokens: int,
) -> Calibrate | None:
    """How to calibrate, or None; asked for without torch it is an error, otherwise a hint."""
    from importlib.util import find_spec

    from supra_cli.shared import pythondocs
    from supra_cli.shared.backends import require
    from supra_cli.shared.output import log
    from supra_core.data.documents import refuse_records
    from supra_core.errors import SupraError
    from supra_core.text import TOKENIZER, read_text

    if tokens < 1:
        raise SupraError(f"--calibration-tokens must be at least 1, not {tokens}")
    if wanted is False and text is not None:
        raise SupraError("--no-calibrate contradicts --calibration-text: leave one of them out")
    asked = wanted or text is not None
    if wanted is False or not (possible or asked):
        return None
    if not asked:
        found = read()
        if not found.spec.is_transformer:
            return None
        reason = None
        if fold:
            reason = "--fold is given: for both, convert without it, then convert that with --fold"
        elif find_spec("torch") is None:
            reason = "that needs torch (pip install 'supra-lm[torch]')"
        elif TOKENIZER not in found.assets():
            reason = f"{source} has no tokenizer"
        if reason is not None:
            log(f"not calibrated: {reason}")
            return None
    require("torch", "calibrating")
    from supra_torch.calibration.conversion import TextCalibration

    if text is not None:
        refuse_records(text)
    prose = pythondocs.language_reference() if text is None else read_text(text)
    return TextCalibration(prose, tokens)


def _linearize_options(
    seed: int,
    recipe: str | None,
    feature_map: str | None,
    decay: str | None,
    output_norm: str | None,
    window: int | None,
    keep_softmax: str | None,
) -> LinearizeOptions | None:
    """None when nothing about linearizing was said, so that a linear source stays as it is."""
    from supra_cli.shared.output import layer_numbers
    from supra_core.conversion.linearize import LinearizeOptions
    from supra_core.errors import SupraError

    if window is not None and window < 1:
        raise SupraError(f"--window must be at least 1 token, not {window}: recipe pure has none")
    given: dict[str, Any] = {
        "preset": recipe,
        "feature_map": feature_map,
        "decay": decay,
        "output_norm": output_norm,
        "window": window,
        "keep_softmax": layer_numbers(keep_softmax) or None,
        "seed": seed or None,
    }
    stated = {name: value for name, value in given.items() if value is not None}
    return replace(LinearizeOptions(), **stated) if stated else None
