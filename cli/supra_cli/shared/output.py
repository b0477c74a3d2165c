"""What commands print: one JSON object, or tables and lines for people.

Everything that a command shows goes through here, because it may quote files and requests of
strangers: characters that would control the terminal are shown as escapes.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from supra_core.visible import visible

if TYPE_CHECKING:
    from supra_core.model.sizes import Sizes


def print_json(result: dict[str, Any]) -> None:
    """The result as one JSON object on stdout."""
    print(json_text(result))


def json_text(result: dict[str, Any]) -> str:
    """The result as JSON; NaN and infinity become null."""
    return json.dumps(_plain(result), indent=2, allow_nan=False)


def log(*lines: str) -> None:
    """Lines for people, on stderr."""
    for line in lines:
        print(visible(line), file=sys.stderr, flush=True)


def say(*lines: str) -> None:
    """A command's result as lines, on stdout."""
    for line in lines:
        print(visible(line))


def write_piece(piece: str) -> None:
    """More of a model's text on stdout: escaped on a terminal, unchanged elsewhere."""
    shown = visible(piece, lines=True) if sys.stdout.isatty() else piece
    print(shown, end="", flush=True)


def log_failure(error: BaseException) -> None:
    """An error of the program itself, with its traceback."""
    print(_block(_trace(error)), file=sys.stderr, flush=True)


@contextmanager
def libraries_visible() -> Iterator[None]:
    """Escape what libraries log and warn of too: they quote files."""
    record, written = logging.getLogRecordFactory(), warnings.formatwarning
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = lambda *given, **more: f"{_block(written(*given, **more))}\n"
    try:
        yield
    finally:
        logging.setLogRecordFactory(record)
        warnings.formatwarning = written


class _Record(logging.LogRecord):
    """A record whose message and traceback are escaped, whatever handler writes them."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        if self.exc_info and self.exc_info[1] is not None:
            self.exc_text = _block(_trace(self.exc_info[1]))

    def getMessage(self) -> str:  # noqa: N802 - logging's own name
        """The message with its arguments."""
        return _block(super().getMessage())


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _block(text: str) -> str:
    """Several lines, indented after the first: only the program's own begin at the margin."""
    return visible(text.rstrip("\n"), lines=True).replace("\n", "\n    ")


def print_table(
    rows: Iterable[Sequence[object]], *, columns: Sequence[str] = (), title: str | None = None
) -> None:
    """A table on stdout; the first column is text, the others are aligned to the right."""
    from rich.console import Console
    from rich.table import Table

    title = None if title is None else visible(title)
    table = Table(title=title, title_justify="left", show_header=bool(columns))
    cells = [[visible(str(cell)) for cell in row] for row in rows]
    for index in range(max((len(row) for row in cells), default=len(columns))):
        header = visible(columns[index]) if index < len(columns) else ""
        table.add_column(header, justify="right" if index and columns else "left")
    for row in cells:
        table.add_row(*row)
    # A pipe has no width; 80 columns would break paths apart.
    width = None if sys.stdout.isatty() else 120
    Console(width=width, markup=False, emoji=False).print(table)


def bytes_text(count: float) -> str:
    """Bytes in a unit that suits them: 12.3 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def cache_text(sizes: Sizes) -> str:
    """The memory of the transformer's KV cache, and which of its layers stop growing."""
    text = f"{bytes_text(sizes.kv_bytes_per_token)} a token, 16 bit"
    if not sizes.transformer_windows:
        return text
    windows = ", ".join(f"{window:,}" for window in sorted(set(sizes.transformer_windows)))
    layers = sizes.kv_bytes_per_token // sizes.layer_kv_bytes_per_token
    count = len(sizes.transformer_windows)
    return f"{text}; {count} of {layers} layers hold the last {windows} tokens only"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
