"""``make fuzz``: a number of inputs for each format, with progress, and a line for each at the end.

    python -m tests.fuzz.run --inputs 100000 --seconds 360 gguf torch

A failing input is written to tests/fuzz/found/, whose files the tests try again; exit code 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from pathlib import Path
from random import Random

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.formats import FORMATS
from tests.fuzz.harness import Files, Format, check_files

FOUND = Path(__file__).parent / "found"
# Inputs of one seed: hypothesis remembers all of its own, and slows down.
BATCH = 1000


class Counts:
    """What happened to the inputs of a format."""

    def __init__(self) -> None:
        self.inputs = self.read = self.seconds = 0.0
        self.failures: dict[str, str] = {}

    def line(self, name: str) -> str:
        rate = self.inputs / self.seconds if self.seconds else 0.0
        refused = self.inputs - self.read
        return (
            f"{name:12} {self.inputs:9,.0f} inputs  {self.read:8,.0f} read  {refused:9,.0f} "
            f"refused  {len(self.failures):3} failures  {self.seconds:6.0f} s  {rate:6.0f} inputs/s"
        )


def fuzz(form: Format, inputs: int, seconds: float, first_seed: int) -> Counts:
    """Try ``inputs`` inputs, fewer when the time is over."""
    counts, begin, batch = Counts(), time.monotonic(), first_seed

    def attempt(case: tuple[Files, str]) -> None:
        files, name = case
        counts.inputs += 1
        try:
            counts.read += check_files(files, name, form.read)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__} {place.filename}:{place.lineno}"
            if key not in counts.failures:
                counts.failures[key] = traceback.format_exc()
                save(form, files, name, len(counts.failures), first_seed)

    while counts.inputs < inputs and time.monotonic() - begin < seconds:
        size = int(min(BATCH, inputs - counts.inputs))
        if form.drawn is None:
            run = settings(
                max_examples=size, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(given(form.cases())(attempt))  # fmt: skip
            seed(batch)(run)()
        else:
            for number in range(size):
                attempt(form.drawn(Random(f"{form.name} {batch} {number}")))
        batch += 1
        counts.seconds = time.monotonic() - begin
        print(f"\r{counts.line(form.name)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return counts


def save(form: Format, files: Files, name: str, number: int, run: int) -> None:
    """Keep an input: ``found/FORMAT-RUN-NUMBER/``, and the name to open in ``.open``."""
    folder = FOUND / f"{form.name}-{run}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        (folder / file).write_bytes(content)
    (folder / ".open").write_text(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("formats", nargs="*", default=list(FORMATS), help=", ".join(FORMATS))
    parser.add_argument("--inputs", type=int, default=100_000, help="for each format")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most, for each")
    parser.add_argument("--seed", type=int, default=0)
    given_arguments = parser.parse_args()
    unknown = [name for name in given_arguments.formats if name not in FORMATS]
    if unknown:
        parser.error(f"unknown format {unknown[0]}: known are {', '.join(FORMATS)}")
    lines, failures = [], 0
    for name in given_arguments.formats:
        counts = fuzz(
            FORMATS[name], given_arguments.inputs, given_arguments.seconds, given_arguments.seed
        )
        lines.append(counts.line(name))
        failures += len(counts.failures)
        for text in counts.failures.values():
            print(text, file=sys.stderr)
    print("\n".join(lines))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
