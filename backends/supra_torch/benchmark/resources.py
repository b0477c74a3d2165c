"""Every row of the kernels' table, compiled ahead of time: a page of what each needs of a GPU.

    python -m supra_torch.benchmark.resources --out PAGE.md [--capability 90] [--dtype bf16]

Cases are kept in PAGE.md.jsonl as they come, so that an interrupted run goes on where it was;
the file is removed when the page is written. Exit status 1 if a case falls short.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import triton

from supra_core.formats.atomic import atomic_file
from supra_torch.benchmark.compilation import (
    TYPES,
    Case,
    Resources,
    assembler_version,
    compile_case,
    complaints,
)
from supra_torch.ops.triton_table import CAPABILITIES

ROLES = ("output", "dq", "dk", "dv")
HEADS = ((32, 32), (64, 64), (96, 96), (128, 128), (256, 256), (128, 64), (64, 128))
"""(Dk, Dv): the sizes that the table serves, and two that differ."""

Found = dict[Case, Resources]


def all_cases(
    capabilities: Sequence[int] = CAPABILITIES, dtypes: Sequence[str] = tuple(TYPES)
) -> Iterator[Case]:
    """Every row of the table in every role: plain and normalised, and once masked and packed."""
    for capability in capabilities:
        for dtype in dtypes:
            for key_size, value_size in HEADS:
                for role in ROLES:
                    for normalise in (False, True):
                        sizes = (normalise, dtype, key_size, value_size, capability)
                        yield Case("scan", role, *sizes)
                        if normalise and dtype == "bf16":
                            yield Case("scan", role, *sizes, masked=True, packed=True)
                            yield Case("segment", role, *sizes)


def compiled(cases: Sequence[Case], kept: Path | None = None, *, workers: int = 2) -> Found:
    """All cases with their resources; those in the file ``kept`` are read, new ones appended."""
    found = {case: known for case, known in _read(kept).items() if case in set(cases)}
    left = [case for case in cases if case not in found]
    start = time.monotonic()
    with ProcessPoolExecutor(workers) as pool:
        running = {pool.submit(compile_case, case): case for case in left}
        for count, future in enumerate(as_completed(running), start=1):
            case = running[future]
            found[case] = future.result()
            if kept is not None:
                with kept.open("a", encoding="utf-8") as lines:
                    record = {"triton": triton.__version__, **asdict(case), **asdict(found[case])}
                    lines.write(json.dumps(record) + "\n")
            if count % 20 == 0 or count == len(left):
                rate = (time.monotonic() - start) / count
                print(
                    f"{count} of {len(left)} compiled, {rate * (len(left) - count) / 60:.0f} "
                    "minutes left",
                    file=sys.stderr,
                )
    return {case: found[case] for case in cases}


def _read(kept: Path | None) -> Found:
    """What an interrupted run with this Triton has compiled already."""
    found: Found = {}
    if kept is None or not kept.is_file():
        return found
    for line in kept.read_text("utf-8").splitlines():
        record = json.loads(line)
        if record.pop("triton") == triton.__version__:
            resources = Resources(**{name: record.pop(name) for name in Resources.__annotations__})
            found[Case(**record)] = resources
    return found


def page(found: Mapping[Case, Resources]) -> str:
    """Markdown: a summary, then a table for each architecture."""
    narrow = [r for case, r in found.items() if max(case.key_size, case.value_size) <= 128]
    short = sum(bool(complaints(case, r)) for case, r in found.items())
    lines = [
        f"# The kernels' resources, Triton {triton.__version__}",
        "",
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, assembler {assembler_version()}; compiled "
        "ahead of time, without a GPU: `python -m supra_torch.benchmark.resources --out PAGE.md`.",
        "",
        f"- {len(found)} cases; {short} fall short.",
        f"- Head sizes to 128: {sum(r.spilled > 0 for r in narrow)} of {len(narrow)} cases spill; "
        f"at most {max((r.shared for r in narrow), default=0)} bytes of shared memory.",
        f"- All sizes: at most {max((r.spilled for r in found.values()), default=0)} bytes "
        f"spilled a thread, {max((r.shared for r in found.values()), default=0)} bytes of shared "
        "memory.",
        "",
        "Registers are those of a thread, spilled bytes those stored and loaded by a thread, "
        'shared memory in bytes a program. fp32 is multiplied as TF32. "Everything" is with the '
        'normaliser, a mask, packed sequences, states and segments at once; "segment" is the '
        "kernel that makes the segments' states. What falls short is in the last column.",
    ]
    for capability in sorted({case.capability for case in found}):
        lines += ["", f"## sm_{capability}", ""]
        lines += [_line(_COLUMNS), "|---" * len(_COLUMNS) + "|"]
        lines += [_row(case, r) for case, r in found.items() if case.capability == capability]
    return "\n".join(lines) + "\n"


_COLUMNS = (
    "Dk", "Dv", "type", "role", "kind", "registers", "spilled", "shared", "tensor cores",
    "falls short",
)  # fmt: skip


def _row(case: Case, found: Resources) -> str:
    kind = "everything" if case.packed else "normalised" if case.normalise else "plain"
    if case.kernel == "segment":
        kind = "segment"
    cells = (
        case.key_size, case.value_size, case.dtype, case.role, kind, found.registers,
        found.spilled, found.shared, found.instruction, ", ".join(complaints(case, found)),
    )  # fmt: skip
    return _line(cells)


def _line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, action="append", choices=CAPABILITIES)
    parser.add_argument("--dtype", action="append", choices=tuple(TYPES))
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    parser.add_argument("--out", type=Path, help="write the page here instead of printing it")
    options = parser.parse_args()
    cases = list(all_cases(options.capability or (80, 90, 100), options.dtype or tuple(TYPES)))
    kept = options.out and options.out.with_name(options.out.name + ".jsonl")
    found = compiled(cases, kept, workers=options.workers)
    if options.out is None:
        print(page(found))
    else:
        with atomic_file(options.out) as partial:
            partial.write_text(page(found), encoding="utf-8")
        kept.unlink(missing_ok=True)
    short = sum(bool(complaints(case, resources)) for case, resources in found.items())
    raise SystemExit(f"{short} of {len(found)} cases fall short" if short else 0)


if __name__ == "__main__":
    main()
