"""Our recipes beside the known ones: same model, same text, same number of tokens.

    python benchmarks/recipes.py MODEL --data TEXT --eval FILE [--eval FILE ...] --out FOLDER

``paper`` is published SUPRA (arXiv 2405.06640), ``lolcats`` LoLCATs (arXiv 2410.10254), both from
their published descriptions. ``--rows FILE`` compares other things, such as the ablations beside
this script: a TOML table a row, with its ``recipe`` (a name, or a file beside FILE) and under
``set`` the settings that differ. Each row is trained by ``supra uptrain`` and measured by ``supra
eval``; FOLDER keeps runs and records, ``recipes.json`` and the table ``recipes.md``, written after
every row. Run again to resume.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from supra_cli.shared.record import write_record
from supra_core.formats.atomic import atomic_file

Row = dict[str, Any]


class Failed(Exception):
    """A command's own message."""


def main() -> None:
    arguments = parsed()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    record = earlier(arguments, out / "recipes.json")
    rows: dict[str, Row] = tomllib.loads(arguments.rows.read_text("utf-8"))
    base = evaluate(arguments, arguments.against or arguments.model, out / "transformer.json")
    record["measured"]["transformer"] = base
    for name in arguments.row or rows:
        try:
            record["trained"][name] = train(arguments, rows[name], out / name)
            record["measured"][name] = evaluate(arguments, str(out / name), out / f"{name}.json")
            record["failed"].pop(name, None)
        except Failed as failure:
            record["failed"][name] = str(failure)
        command = shlex.join(["python", "benchmarks/recipes.py", *sys.argv[1:]])
        write_record(out / "recipes.json", {**record, "command": command})
        with atomic_file(out / "recipes.md") as beside:
            beside.write_text(table(record), encoding="utf-8")
    print((out / "recipes.md").read_text("utf-8"))


def earlier(arguments: argparse.Namespace, file: Path) -> dict[str, Any]:
    """The record of an earlier call with the same settings, or an empty one."""
    settings = {
        "model": arguments.model,
        "data": arguments.data,
        "eval": [str(path) for path in arguments.eval],
        "tokens": arguments.tokens,
        "limit": arguments.limit,
        "examples": arguments.examples,
        "seed": arguments.seed,
        "form": arguments.form,
        **({"set": arguments.set} if arguments.set else {}),
        **({"against": arguments.against} if arguments.against else {}),
    }
    if not file.is_file():
        return {"settings": settings, "trained": {}, "measured": {}, "failed": {}}
    before: dict[str, Any] = json.loads(file.read_text("utf-8"))
    if before["settings"] != settings:
        sys.exit(f"{file} was begun with {before['settings']}: name another folder with --out")
    return {name: before[name] for name in ("settings", "trained", "measured", "failed")}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="the model that every row trains")
    parser.add_argument("--against", help="the transformer, if MODEL is not one")
    parser.add_argument("--data", required=True, help="text to train on, as for supra uptrain")
    parser.add_argument(
        "--eval", action="append", type=Path, required=True, help="a file, as for supra eval --data"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--rows",
        type=Path,
        default=Path(__file__).with_name("recipes.toml"),
        help="what to compare",
    )
    parser.add_argument("--row", action="append", help="name of a row; repeatable; default: all")
    parser.add_argument("--tokens", type=int, default=102_400)
    parser.add_argument("--limit", type=int, default=20_480, help="tokens of each text")
    parser.add_argument("--examples", type=int, default=250, help="examples of each .jsonl file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], help="setting of every row")
    parser.add_argument("--form", choices=("recurrent", "parallel"), default="recurrent")
    return parser.parse_args()


def train(arguments: argparse.Namespace, row: Row, run: Path) -> dict[str, Any]:
    """Uptrain unless it is done; the summary, and the seconds of calibration and steps."""
    settings = {"tokens": arguments.tokens, "seed": arguments.seed, **row.get("set", {})}
    recipe = row["recipe"]
    if recipe.endswith(".toml"):
        recipe = str(arguments.rows.parent / recipe)
    given = [f"{key}={toml(value)}" for key, value in settings.items()] + arguments.set
    sets = [part for setting in given for part in ("--set", setting)]
    command = [
        "uptrain", arguments.model, "--recipe", recipe, "--data", arguments.data,
        "--out", str(run), *sets,
    ]  # fmt: skip
    summary = supra(command)
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    steps = [record for record in records if "step_tokens" in record]
    fits = [record for record in records if "calibration" in record]
    return {
        **summary,
        "calibration_tokens": sum(record["calibration_tokens"] for record in fits),
        "calibration_seconds": sum(record["seconds"] for record in fits),
        "step_seconds": sum(r["step_tokens"] / r["tokens_per_second"] for r in steps),
        "last_losses": last_losses(steps),
        "command": shlex.join(["supra", *command]),
    }


def last_losses(steps: list[dict[str, Any]]) -> dict[str, float]:
    """The mean loss of the last eighth of each stage's steps, by stage."""
    losses: dict[str, list[float]] = {}
    for step in steps:
        losses.setdefault(f"{step['stage_index']}: {step['stage']}", []).append(step["loss"])
    return {
        name: statistics.mean(values[-max(1, len(values) // 8) :])
        for name, values in losses.items()
    }


def toml(value: Any) -> str:
    """A setting's value on the command line, where plain texts need no quotes."""
    return value if isinstance(value, str) else json.dumps(value)


def evaluate(arguments: argparse.Namespace, model: str, record: Path) -> dict[str, Any]:
    """Results by name, from the records of ``supra eval``, which are made unless they are there.

    A record that is older than the model's last training is made again.
    """
    summary = Path(model) / "summary.json"
    trained = summary.stat().st_mtime if summary.is_file() else 0.0
    results: dict[str, Any] = {}
    texts = [path for path in arguments.eval if path.suffix != ".jsonl"]
    tasks = [path for path in arguments.eval if path.suffix == ".jsonl"]
    for paths, limit, part in (
        (texts, arguments.limit, record.with_suffix(".texts.json")),
        (tasks, arguments.examples, record.with_suffix(".tasks.json")),
    ):
        if not paths:
            continue
        if not part.is_file() or part.stat().st_mtime < trained:
            files = [word for path in paths for word in ("--data", str(path))]
            base = model == (arguments.against or arguments.model)
            form = "parallel" if base else arguments.form
            supra(
                ["eval", model, *files, "--no-teacher", "--form", form,
                 "--limit", str(limit), "--out", str(part), "--force"]
            )  # fmt: skip
        results |= json.loads(part.read_text("utf-8"))["results"]
    return results


def supra(command: list[str]) -> dict[str, Any]:
    """What a command prints with --json; its progress goes to stderr. Raises Failed."""
    done = subprocess.run(
        [sys.executable, "-m", "supra_cli", *command, "--json"], stdout=subprocess.PIPE, check=False
    )
    if done.returncode < 0 or done.returncode == 130:
        # Interrupted: the next call resumes.
        sys.exit(130)
    if done.returncode:
        raise Failed(f"{shlex.join(['supra', *command])} ended with {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def table(record: dict[str, Any]) -> str:
    """Markdown: perplexities over the transformer's, accuracies in %, their mean."""
    base = record["measured"]["transformer"]
    tasks = [name for name, result in base.items() if "acc" in result["metrics"]]
    texts = [name for name in base if name not in tasks]
    header = ["recipe", *texts, *tasks, "mean of tasks", "tokens", "minutes"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for recipe, results in record["measured"].items():
        if recipe in record["failed"]:
            continue
        ratios = [perplexity(results, name) / perplexity(base, name) for name in texts]
        shares = [accuracy(results[name]["metrics"]) for name in tasks]
        trained = record["trained"].get(recipe)
        rows.append(
            [
                recipe,
                *(f"{ratio:.2f} x" for ratio in ratios),
                *(f"{100 * share:.1f}" for share in shares),
                f"{100 * sum(shares) / len(shares):.1f}" if shares else "-",
                f"{trained['tokens']:,}" if trained else "-",
                f"{minutes(trained):.1f}" if trained else "-",
            ]
        )
    rows += [[name, "failed", *[""] * (len(header) - 2)] for name in record["failed"]]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    fitted = max((one["calibration_tokens"] for one in record["trained"].values()), default=0)
    return (
        f"Seed {record['settings']['seed']}; recipes that calibrate read {fitted:,} of the first "
        "tokens once more, without a gradient step; minutes are those of calibration and steps."
        "\n\n" + "\n".join(lines) + "\n"
    )


def minutes(trained: dict[str, Any]) -> float:
    return float(trained["calibration_seconds"] + trained["step_seconds"]) / 60


def perplexity(results: dict[str, Any], name: str) -> float:
    return float(results[name]["metrics"]["perplexity"])


def accuracy(metrics: dict[str, float]) -> float:
    """Length-normalised where there are choices."""
    return metrics.get("acc_norm", metrics["acc"])


if __name__ == "__main__":
    main()
