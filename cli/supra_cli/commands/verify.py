"""``supra verify``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer

from supra_cli.shared import options

if TYPE_CHECKING:
    from supra_core.measure.verify import Report
    from supra_core.runtime.backend import Form, Ids

EXIT_CHECK_FAILED = 1
DEFAULT_BACKENDS = ("torch", "mlx")


def command(
    first: Annotated[Path, typer.Argument(metavar="A", help="A model.")],
    second: Annotated[
        Path | None,
        typer.Argument(metavar="[B]", help="Second model: the first backend runs A, all others B."),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(help="reference, torch, mlx, transformers, mlx-lm; repeatable."),
    ] = None,
    ids: Annotated[Path | None, typer.Option(help="Token ids, a .npy file (T,) or (B, T).")] = None,
    text: Annotated[str | None, typer.Option(help="Text to tokenise and compare on.")] = None,
    form: options.Form = "parallel",
    save_logits: Annotated[
        Path | None, typer.Option(help="Folder for BACKEND.npy, float32 (B, T, V).")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Allowed difference of logits.",
            show_default="1e-4 of the largest in float32, 2e-2 in float16, 1e-1 in bfloat16",
        ),
    ] = None,
    dtype: options.Dtype = None,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Compare the files of folder A with SHA256SUMS.")
    ] = False,
    json_output: options.Json = False,
) -> None:
    """Compare models or backends, or a folder with its checksums; exit code 1 if they differ."""
    if checksums:
        _refuse_more(second, backend, ids, text, save_logits)
        _verify_checksums(first, json_output)
        return
    from supra_cli.shared.output import print_json
    from supra_cli.shared.progress import ProgressReporter
    from supra_core.measure.verify import candidates, verify
    from supra_core.runtime.backend import is_installed

    names = backend or list(filter(is_installed, DEFAULT_BACKENDS)) or ["reference"]
    chosen = candidates(first, second, names, parse_form(form))
    tokens = _tokens(first, ids, text)
    with ProgressReporter() as progress:
        report = verify(
            chosen, tokens, tolerance=tolerance, dtype=dtype, save_logits=save_logits,
            progress=progress,
        )  # fmt: skip
    if json_output:
        print_json(_result(report))
    else:
        _show(report)
    if not report.passed:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _refuse_more(*others: object) -> None:
    from supra_core.errors import SupraError

    if any(other is not None and other != [] for other in others):
        raise SupraError("--checksums compares files alone: give one folder and no other choices")


def _verify_checksums(folder: Path, json_output: bool) -> None:
    from supra_cli.shared.output import log, print_json
    from supra_core.formats import checksums

    found = checksums.check(folder)
    if json_output:
        print_json({"folder": str(folder), "passed": found.passed, **asdict(found)})
    else:
        for problem in found.problems:
            log(f"{folder / problem.file} {problem.problem}")
        for name in found.unlisted:
            log(f"{folder / name} has no line in {checksums.NAME}")
        log(f"{found.files - len(found.problems)} of {found.files} files are as they were written")
    if not found.passed:
        raise typer.Exit(EXIT_CHECK_FAILED)


def parse_form(name: str) -> Form:
    """One of the three forms; :class:`SupraError` lists them."""
    from supra_core.errors import SupraError
    from supra_core.runtime.backend import Form

    if name not in get_args(Form):
        raise SupraError(f"--form '{name}' is unknown: use one of {', '.join(get_args(Form))}")
    return cast("Form", name)


def _tokens(model: Path, ids: Path | None, text: str | None) -> Ids:
    from supra_core.errors import SupraError
    from supra_core.measure.verify import random_ids, read_ids
    from supra_core.sources.source import open_source

    if ids is not None and text is not None:
        raise SupraError("--ids and --text exclude each other: give one of them")
    if ids is not None:
        return read_ids(ids)
    source = open_source(model)
    if text is None:
        return random_ids(source.spec.vocab_size)
    encoded = source.tokenizer().encode(text)
    if not len(encoded.ids):
        raise SupraError("--text has no tokens: give some text")
    return encoded.ids[None]


def _result(report: Report) -> dict[str, Any]:
    return {
        "first": report.first.label,
        "batch": report.batch,
        "tokens": report.tokens,
        "tolerance": report.tolerance,
        "passed": report.passed,
        "comparisons": [
            {
                **asdict(one.candidate), "path": str(one.candidate.path),
                **asdict(one.difference), "within_tolerance": one.within_tolerance,
            }
            for one in report.comparisons
        ],
    }  # fmt: skip


def _show(report: Report) -> None:
    from supra_cli.shared.output import log, print_table

    if not report.comparisons:
        log(f"{report.first.label}: logits computed, nothing to compare them with")
        return
    rows = [
        (
            one.candidate.label,
            one.candidate.form,
            f"{one.difference.max_abs_difference:.2e}",
            f"{one.difference.mean_kl:.2e}",
            f"{100 * one.difference.top1_agreement:.1f} %",
            "yes" if one.within_tolerance else "NO",
        )
        for one in report.comparisons
    ]
    columns = (
        f"against {report.first.label}", "form", "max difference", "KL, nats", "same top-1",
        f"within {report.tolerance:.2g}",
    )  # fmt: skip
    print_table(rows, columns=columns)
