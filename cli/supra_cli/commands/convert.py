"""``supra convert``."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from supra_cli.shared import options
from supra_cli.shared.output import log, print_json
from supra_core.errors import SupraError, install

if TYPE_CHECKING:
    from supra_core.conversion.convert import Conversion, ConversionRequest, Quantise
    from supra_core.conversion.linearize import LinearizeOptions
    from supra_core.progress import Progress


def command(
    source: Annotated[str, typer.Argument(help="Hub id, folder, .gguf or OpenLM checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help="supra, hf or openlm.")] = "supra",
    linearize: Annotated[
        bool | None,
        typer.Option(
            "--linearize/--no-linearize", help="Default: linearize a transformer if TO is supra."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="windowed (default), pure, window (no state), or paper (the published model)."
        ),
    ] = None,
    feature_map: Annotated[
        str | None, typer.Option(help="relu, signed_relu, signed_softmax or none.")
    ] = None,
    decay: Annotated[str | None, typer.Option(help="lightning, retnet, none or learned.")] = None,
    output_norm: Annotated[str | None, typer.Option(help="group_norm, sum or sum_sink.")] = None,
    window: Annotated[
        int | None,
        typer.Option(help="Tokens with softmax attention; recipes windowed and window: 128."),
    ] = None,
    keep_softmax: Annotated[
        str | None, typer.Option(help="Layers that keep softmax attention, as in 0,15.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the paper recipe's random weights.")] = 0,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Fit the new layers to the transformer without training. Default: if torch is "
            "installed and the recipe has something to fit (not paper, window).",
        ),
    ] = None,
    calibration_text: Annotated[
        Path | None, typer.Option(help="Text to calibrate on; default: Python's documentation.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 16_384,
    dtype: options.Dtype = None,
    fold: Annotated[
        bool, typer.Option("--fold/--no-fold", help="Multiply feature maps into q and k.")
    ] = False,
    quantize: Annotated[
        int | None, typer.Option(help="Quantise for MLX to 4, 6 or 8 bits; some matrices get more.")
    ] = None,
    config: options.OpenLMConfig = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id; also org/name@REVISION.")
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Read a hub id from the cache alone.")
    ] = False,
    rope_factors: Annotated[
        str | None,
        typer.Option(
            help="Longrope (Phi-3 128k): short factors (default), or long for long texts."
        ),
    ] = None,
    push_to: Annotated[str | None, typer.Option(help="Hub id to push OUT to.")] = None,
    private: options.Private = False,
    force: options.Force = False,
    json_output: options.Json = False,
) -> None:
    """Convert a model, and linearize it."""
    from supra_cli.shared import pushing
    from supra_cli.shared.progress import ProgressReporter
    from supra_core.conversion.convert import ConversionRequest, convert
    from supra_core.model.layout import parameter_count

    start = time.monotonic()
    chosen = _linearize_options(
        preset=recipe, feature_map=feature_map, decay=decay, output_norm=output_norm,
        window=window, keep_softmax=_layer_numbers(keep_softmax), seed=seed or None,
    )  # fmt: skip
    request = ConversionRequest(
        source, out, to, linearize, chosen, fold=fold, quantise=_quantisation(quantize),
        dtype=dtype, rope_factors=rope_factors, force=force, config=config, revision=revision,
        offline=offline,
    )  # fmt: skip
    if private and push_to is None:
        raise SupraError("--private needs --push-to: give a hub id, or omit --private")
    target = None
    if push_to is not None:
        target = pushing.target(push_to, source=source, offline=offline)
    with ProgressReporter() as progress:
        request = _with_calibration(
            request, progress, calibrate, calibration_text, calibration_tokens
        )
        done = convert(request, progress)
    _log_notes(done)
    pushed = None if target is None else pushing.push_written(out, target, private)
    result = {
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
        "layer_types": [layer.mixer.layer_type for layer in done.spec.layers],
        "left_out": list(done.left_out),
        "not_finite": list(done.not_finite),
        "notes": list(done.notes),
        "stated_source": done.spec.provenance.source,
        "pushed": pushed,
        "seconds": round(time.monotonic() - start, 2),
    }
    if json_output:
        print_json(result)
    else:
        _log_summary(result)


def _log_notes(done: Conversion) -> None:
    for sentence in done.notes:
        log(f"note: {sentence}")
    if done.not_finite:
        more = f" and {len(done.not_finite) - 3} more" if len(done.not_finite) > 3 else ""
        log(
            f"warning: {', '.join(done.not_finite[:3])}{more} contain NaN or infinity, and so will "
            "the answers: get the model again"
        )


def _log_summary(result: dict[str, Any]) -> None:
    dtype, bits, types = result["dtype"], result["quantized"], result["layer_types"]
    stored = dtype if bits is None else f"{bits} bits and {dtype}"
    kinds = ", ".join(f"{types.count(kind)} {kind}" for kind in dict.fromkeys(types))
    log(f"{result['out']}: {result['parameters']:,} parameters in {stored}, layers: {kinds}")
    for sentence in result["left_out"]:
        log(f"note: {sentence}")


def _quantisation(bits: int | None) -> Quantise | None:
    from supra_core.runtime.backend import importing

    if bits is None:
        return None
    with importing("mlx", "quantising"):
        from supra_mlx.quantize import check_bits, quantised

    check_bits(bits)
    return partial(quantised, bits=bits)


def _with_calibration(
    request: ConversionRequest,
    progress: Progress,
    wanted: bool | None,
    text: Path | None,
    tokens: int,
) -> ConversionRequest:
    """The request with a calibration if it is asked for, or possible by default."""
    from supra_cli.shared import pythondocs
    from supra_cli.shared.backends import require
    from supra_core.data.documents import refuse_records
    from supra_core.text import read_text

    if tokens < 1:
        raise SupraError(f"--calibration-tokens must be at least 1, not {tokens}")
    if wanted is False and text is not None:
        raise SupraError("--no-calibrate contradicts --calibration-text: omit one of them")
    if wanted is False:
        return request
    if not wanted and text is None:
        request = request.open(progress)
        if not request.is_calibrated_by_default:
            return request
        reason = _obstacle(request)
        if reason is not None:
            log(f"not calibrated: {reason}")
            return request
    require("torch", "calibrating")
    from supra_torch.calibration.conversion import TextCalibration

    if text is not None:
        refuse_records(text)
    prose = pythondocs.language_reference() if text is None else read_text(text)
    return replace(request, calibrate=TextCalibration(prose, tokens))


def _obstacle(request: ConversionRequest) -> str | None:
    """Why a model that is calibrated by default cannot be."""
    from supra_core.text import TOKENIZER

    if request.fold:
        return "--fold is given: to do both, convert without --fold, then convert OUT with it"
    if find_spec("torch") is None:
        return f"that needs torch ({install('torch')})"
    if TOKENIZER not in request.found.assets():
        return f"{request.source} has no tokenizer"
    return None


def _linearize_options(**given: Any) -> LinearizeOptions | None:
    """None if nothing about linearizing is said, so that a linear source stays as it is."""
    from supra_core.conversion.linearize import LinearizeOptions

    stated = {name: value for name, value in given.items() if value is not None}
    return LinearizeOptions(**stated) if stated else None


def _layer_numbers(text: str | None) -> tuple[int, ...] | None:
    """``0,15`` as numbers."""
    try:
        return tuple(sorted({int(part) for part in text.split(",")})) if text else None
    except ValueError:
        raise SupraError(
            f"--keep-softmax '{text}' is not a list of layers: write numbers as in 0,15"
        ) from None
