"""Our recipes beside the known ones: same model, same text, same number of tokens.

    python benchmarks/recipes.py MODEL --data TEXT --eval FILE [--eval FILE ...] --out FOLDER

``paper`` is published SUPRA (arXiv 2405.06640), ``lolcats`` LoLCATs (arXiv 2410.10254), both from
their published descriptions. Each recipe is trained by ``supra uptrain`` and measured by ``supra
eval`` in the recurrent form; FOLDER keeps runs and records, ``recipes.json`` and the table
``recipes.md``. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPES = ("paper", "lolcats", "lora", "pure", "windowed", "hybrid")
# The paper's rates for 7B models move nothing in some hundred steps: those of its 1B model, and
# steps as small as the other recipes'.
SETTINGS = {
    "paper": {
        "stages.0.learning_rate": "3e-4",
        "stages.0.new_learning_rate": "3e-4",
        "stages.0.batch_share": "0.5",
    }
}


def main() -> None:
    arguments = parsed()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    measured = {"transformer": evaluate(arguments, arguments.model, out / "transformer.eval.json")}
    trained: dict[str, Any] = {}
    for recipe in arguments.recipe or RECIPES:
        trained[recipe] = train(arguments, recipe, out / recipe)
        measured[recipe] = evaluate(arguments, str(out / recipe), out / f"{recipe}.eval.json")
    record = {
        "command": shlex.join(sys.argv),
        "tokens": arguments.tokens,
        "seed": arguments.seed,
        "trained": trained,
        "measured": measured,
    }
    (out / "recipes.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    text = table(record)
    (out / "recipes.md").write_text(text, encoding="utf-8")
    print(text)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", help="a plain transformer that supra reads")
    parser.add_argument("--data", required=True, help="text to train on, as for supra uptrain")
    parser.add_argument("--eval", action="append", required=True, help="as --data of supra eval")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", action="append", help=f"default: {', '.join(RECIPES)}")
    parser.add_argument("--tokens", type=int, default=102_400)
    parser.add_argument("--limit", type=int, default=20_480, help="tokens or examples a file")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train(arguments: argparse.Namespace, recipe: str, run: Path) -> dict[str, Any]:
    """Uptrain, or take what is there; the summary, and the seconds of all steps."""
    settings = {
        "tokens": str(arguments.tokens),
        "seed": str(arguments.seed),
        "calibrate_tokens": "4096",
        **SETTINGS.get(recipe, {}),
    }
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = ["uptrain", arguments.model, "--recipe", recipe, "--data", arguments.data]
    summary = supra([*command, "--out", str(run), *sets])
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "step_tokens" in record]
    seconds = sum(record["step_tokens"] / record["tokens_per_second"] for record in steps)
    return {**summary, "step_seconds": round(seconds), "command": shlex.join(command)}


def evaluate(arguments: argparse.Namespace, model: str, record: Path) -> dict[str, Any]:
    """The results by name of the record of ``supra eval``, which is made unless it is there."""
    if not record.is_file():
        files = [part for path in arguments.eval for part in ("--data", path)]
        form = "parallel" if model == arguments.model else "recurrent"
        supra(
            ["eval", model, *files, "--no-teacher", "--form", form,
             "--limit", str(arguments.limit), "--out", str(record)]
        )  # fmt: skip
    results: dict[str, Any] = json.loads(record.read_text("utf-8"))["results"]
    return results


def supra(command: list[str]) -> dict[str, Any]:
    """What a command prints with --json; its progress goes to stderr, its failure ends this."""
    done = subprocess.run(
        [sys.executable, "-m", "supra_cli", *command, "--json"], stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def table(record: dict[str, Any]) -> str:
    """Markdown: perplexities over the transformer's, accuracies in %, their mean."""
    base = record["measured"]["transformer"]
    tasks = [name for name, result in base.items() if "acc" in result["metrics"]]
    texts = [name for name in base if name not in tasks]
    header = ["recipe", *texts, *tasks, "mean of tasks", "minutes of steps"]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
    for recipe, results in record["measured"].items():
        ratios = [perplexity(results, name) / perplexity(base, name) for name in texts]
        shares = [accuracy(results[name]["metrics"]) for name in tasks]
        steps = record["trained"].get(recipe)
        rows.append(
            [
                recipe,
                *(f"{ratio:.2f} x" for ratio in ratios),
                *(f"{100 * share:.1f}" for share in shares),
                f"{100 * sum(shares) / len(shares):.1f}" if shares else "-",
                f"{steps['step_seconds'] / 60:.1f}" if steps else "-",
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return f"{record['tokens']:,} tokens each, seed {record['seed']}.\n\n" + "\n".join(lines) + "\n"


def perplexity(results: dict[str, Any], name: str) -> float:
    return float(results[name]["metrics"]["perplexity"])


def accuracy(metrics: dict[str, float]) -> float:
    """Length-normalised where there are choices."""
    return metrics.get("acc_norm", metrics["acc"])


if __name__ == "__main__":
    main()
