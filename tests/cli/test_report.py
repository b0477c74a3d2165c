"""The report on a tiny run, end to end: its page, its record, and what it refuses."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from supra_cli.main import app
from supra_cli.report_card import measure, model_sections, probe_sections, sides
from supra_cli.report_card.curves import read_curve
from supra_cli.report_card.inputs import read_inputs
from supra_cli.report_card.parts import ABSENT
from supra_cli.report_card.settings import ReportSettings
from supra_core.errors import FormatError
from supra_core.measure.intervals import of_share
from supra_core.measure.tasks import TASKS
from supra_core.measure.tasks.positions import position_lengths
from supra_core.progress import silent
from supra_core.runtime import backend
from tests.cli.test_bad_input import refused

pytest.importorskip("torch")
pytest.importorskip("matplotlib")

runner = CliRunner()

SECTIONS = {
    "quality", "training", "layers", "positions", "variants", "recall", "permutations", "samples",
    "cost",
}  # fmt: skip
_VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Sections, table cells and every attribute of a page; open elements must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sections: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.cells: list[tuple[str, list[float]]] = []
        self.figures = 0
        self._cell: list[str] | None = None
        self._values: list[float] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        given = {name: value or "" for name, value in attrs}
        self.attributes += given.items()
        if tag == "section":
            self.sections.append(given["id"])
        if tag == "td":
            self._cell = []
            self._values = [float(x) for x in given.get("data-values", "").split()]
        self.figures += tag == "svg"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "td" and self._cell is not None:
            self.cells.append(("".join(self._cell), self._values))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield float(value)


@pytest.fixture(scope="module")
def files(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A text, passages and questions."""
    folder = tmp_path_factory.mktemp("data")
    passages = [{"context": "The state of a", "continuation": word} for word in ("text", "size")]
    questions = [
        {"query": f"{query}?\n", "choices": ["size", "the text", "a state"], "gold": gold}
        for query, gold in (("What", 0), ("Whose", 1), ("Which", 2))
    ]
    for name, items in (("last.jsonl", passages), ("choice.jsonl", questions)):
        (folder / name).write_text("\n".join(map(json.dumps, items)))
    return [text_file, folder / "last.jsonl", folder / "choice.jsonl"]


@pytest.fixture(scope="module")
def run(tiny_transformer: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a windowed model: one step of each stage, or a few."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = runner.invoke(
        app,
        [
            "uptrain", str(tiny_transformer), "--data", str(text_file), "--out", str(folder),
            "--set", "tokens=512", "--set", "sequence_length=32", "--set", "batch_tokens=64",
            "--set", "linearize.window=8",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture(scope="module")
def report(
    run: Path, files: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path, str]:
    """The record that --json prints, the page's place, and its text."""
    out = tmp_path_factory.mktemp("report") / "report.html"
    data = [argument for file in files for argument in ("--data", str(file))]
    done = runner.invoke(
        app, ["report", str(run), "--out", str(out), *data, "--quick", "--limit", "300", "--json"]
    )
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout), out, out.read_text("utf-8")


def test_the_page_is_whole_and_needs_nothing_beside_it(
    report: tuple[dict[str, Any], Path, str],
) -> None:
    _, _, text = report
    page = Page(text)
    assert page.open == []
    assert set(page.sections) == SECTIONS
    # Training, layers, positions, recall, letters and memory.
    assert page.figures == 6
    assert not re.search(r"https?:|//[a-z]", text)
    for name, value in page.attributes:
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#"), value
    ids = [value for name, value in page.attributes if name == "id"]
    targets = {v[1:] for name, v in page.attributes if name == "href"}
    targets |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert targets <= set(ids)


def test_every_number_of_the_tables_is_in_the_record(
    report: tuple[dict[str, Any], Path, str],
) -> None:
    record, _, text = report
    known = set(_numbers(record))
    shown = 0
    for cell, values in Page(text).cells:
        for value in values:
            assert value in known, f"{value} of '{cell}'"
            shown += 1
        if values:
            # What is read is that number, rounded.
            first = cell.split(" (")[0].replace(",", "")
            match = re.match(r"(-?[\d.]+(?:e[+-]\d+)?)( %| KiB| MiB| GiB)?", first)
            assert match is not None, cell
            factor = {" %": 0.01, " KiB": 2**10, " MiB": 2**20, " GiB": 2**30}
            read = float(match[1]) * factor.get(match[2] or "", 1.0)
            assert read == pytest.approx(values[0], rel=0.05, abs=6e-4), cell
    assert shown > 150


def test_the_record_is_complete(
    report: tuple[dict[str, Any], Path, str], run: Path, tiny_transformer: Path
) -> None:
    record, out, _ = report
    assert json.loads(out.with_suffix(".json").read_text("utf-8")) == record
    assert {"command", "date", "machine", "seconds", "settings"} <= record.keys()
    assert record["machine"]["python"]
    assert record["settings"]["seed"] == 0
    assert record["model"]["path"] == str(run)
    assert record["model"]["form"] == "recurrent"
    # The run names its teacher.
    assert record["teacher"]["path"] == str(tiny_transformer)
    assert record["teacher"]["form"] == "parallel"
    quality = record["quality"]["files"]
    assert set(quality) == {"text.txt", "last.jsonl", "choice.jsonl"}
    text = quality["text.txt"]
    assert text["student"]["tokens"] == 299
    assert text["ratio"] == text["student"]["perplexity"] / text["teacher"]["perplexity"]
    low, high = quality["choice.jsonl"]["teacher"]["intervals"]["acc"]
    metrics = quality["choice.jsonl"]["teacher"]["metrics"]
    assert (low, high) == of_share(round(3 * metrics["acc"]), 3)
    passages = quality["last.jsonl"]["student"]
    low, high = passages["intervals"]["perplexity"]
    value, error = (passages["metrics"][name] for name in ("perplexity", "perplexity_stderr"))
    assert math.sqrt(low * high) == pytest.approx(value)
    assert math.log(high / low) == pytest.approx(2 * 1.96 * error / value, rel=1e-4)
    assert all(len(one["sha256"]) == 64 and one["bytes"] for one in record["data"])
    assert [one["layer"] for one in record["layer_errors"]["layers"]] == [0, 1]
    for role in ("student", "teacher"):
        for section in ("positions", "recall", "copying", "permutations", "samples", "speed"):
            assert "not_measured" not in record[section][role], section
        assert record["permutations"][role]["orders"] == 9
        assert len(record["samples"][role]["answers"]) == 6
        assert record["samples"][role]["prompt_form"] == "the model's chat template"


def test_the_parts_of_a_windowed_model_are_measured(
    report: tuple[dict[str, Any], Path, str],
) -> None:
    variants, quality = report[0]["variants"], report[0]["quality"]["files"]["text.txt"]
    whole = variants["whole"]["perplexity"]
    assert whole == pytest.approx(quality["student"]["perplexity"], rel=1e-6)
    for name in ("without_window", "window_alone"):
        assert variants[name]["perplexity"] != pytest.approx(whole, rel=1e-6)
        assert variants[name]["ratio"] == variants[name]["perplexity"] / whole


def test_the_curves_are_the_runs_own(report: tuple[dict[str, Any], Path, str], run: Path) -> None:
    training = report[0]["training"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for index, stage in enumerate(training["stages"]):
        losses = [line["loss"] for line in lines if line.get("stage_index") == index]
        assert stage["losses"] == losses
        assert stage["steps"] == len(losses)
    assert [stage["stage"] for stage in training["stages"]] == ["transfer"] + 2 * ["distill"]
    held_out = [line["perplexity"] for line in lines if "perplexity" in line]
    assert [one["perplexity"] for one in training["held_out"]] == held_out


def test_a_model_without_teacher_or_window(
    tiny_transformer: Path, text_file: Path, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "r.html"
    made = runner.invoke(
        app, ["convert", str(tiny_transformer), str(model), "--recipe", "pure", "--no-calibrate"]
    )
    assert made.exit_code == 0, made.output
    done = runner.invoke(
        app,
        [
            "report", str(model), "--out", str(out), "--data", str(text_file), "--quick",
            "--limit", "100", "--no-teacher", "--seed", "7",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Perplexity of texts" in done.stdout
    record = json.loads(out.with_suffix(".json").read_text("utf-8"))
    assert record["teacher"] is None
    assert record["settings"]["seed"] == 7
    for section in ("training", "layer_errors", "variants"):
        assert "not_measured" in record[section]
    page = Page(out.read_text("utf-8"))
    assert set(page.sections) == SECTIONS
    assert "no layer of the model has linear attention with a window" in out.read_text("utf-8")


def test_one_file_that_fails_costs_no_other(run: Path, files: list[Path], tmp_path: Path) -> None:
    """A passage longer than the model's positions cannot be scored: the page says so."""
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"context": "The state", "continuation": "size " * 5000}))
    out = tmp_path / "r.html"
    done = runner.invoke(
        app,
        [
            "report", str(run), "--out", str(out), "--data", str(files[0]), "--data", str(long),
            "--quick", "--limit", "100",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    quality = json.loads(out.with_suffix(".json").read_text("utf-8"))["quality"]["files"]
    assert quality["text.txt"]["ratio"] > 0
    for role in ("student", "teacher"):
        assert "not_measured" in quality["long.jsonl"][role]
    assert out.read_text("utf-8").count("Not measured") >= 1


def test_an_error_of_any_kind_costs_its_own_section(
    run: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: Exception) -> Any:
        def fail(*given: Any, **named: Any) -> Any:
            raise error

        return fail

    for task, error in (
        ("copying", RuntimeError("out of memory\nmore of it")),
        ("lambada", IndexError("no\x1b[31m such")),
    ):
        monkeypatch.setattr(type(TASKS[task]), "prepared", failing(error))
    monkeypatch.setattr(sides, "speed", failing(MemoryError()))
    monkeypatch.setattr(measure, "_variants", failing(OSError(28, "no room")))
    monkeypatch.setattr(measure, "_memory", failing(TypeError("shapes")))
    out, secret = tmp_path / "r.html", tmp_path / "seconds"
    # A file of this name had the place of how long the section took.
    secret.write_bytes(files[0].read_bytes())
    done = runner.invoke(
        app,
        [
            "report", str(run), "--out", str(out), "--data", str(secret), "--data", str(files[1]),
            "--quick", "--limit", "64",
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    record = json.loads(out.with_suffix(".json").read_text("utf-8"))
    quality = record["quality"]
    assert quality["files"]["seconds"]["ratio"] > 0
    assert isinstance(quality["seconds"]["student"], float)
    for role in ("student", "teacher"):
        assert record["copying"][role]["not_measured"] == "RuntimeError: out of memory"
        assert record["speed"][role]["not_measured"] == "MemoryError"
        reason = quality["files"]["last.jsonl"][role]["not_measured"]
        assert reason == "IndexError: no\\x1b[31m such"
        assert record["recall"][role]["distances"]
    assert record["variants"]["not_measured"] == "OSError: [Errno 28] no room"
    assert record["memory"]["not_measured"] == "TypeError: shapes"
    page = Page(out.read_text("utf-8"))
    assert page.open == []
    assert set(page.sections) == SECTIONS
    assert "TypeError: shapes" in out.read_text("utf-8")


def test_a_teacher_that_cannot_be_loaded_costs_its_own_figures(
    run: Path, files: list[Path], tiny_transformer: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    load = backend.load

    def loaded(name: str, path: str, **given: Any) -> Any:
        if path == str(tiny_transformer):
            raise RuntimeError("out of memory")
        return load(name, path, **given)

    monkeypatch.setattr("supra_core.runtime.backend.load", loaded)
    out = tmp_path / "r.html"
    asked = ["report", str(run), "--out", str(out), "--data", str(files[0]), "--quick"]
    done = runner.invoke(app, [*asked, "--limit", "64"])
    assert done.exit_code == 0, done.output
    record = json.loads(out.with_suffix(".json").read_text("utf-8"))
    text = record["quality"]["files"]["text.txt"]
    assert text["student"]["perplexity"] > 0
    assert text["teacher"]["not_measured"] == record["speed"]["teacher"]["not_measured"]
    assert text["ratio"] is None
    assert Page(out.read_text("utf-8")).open == []


def test_an_interruption_is_not_held_for_a_failure(
    run: Path, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*given: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("supra_core.measure.tasks.perplexity.perplexity", interrupted)
    out = tmp_path / "r.html"
    done = runner.invoke(app, ["report", str(run), "--out", str(out), "--data", str(files[0])])
    assert done.exit_code != 0
    assert not out.exists() and not out.with_suffix(".json").exists()


def test_bad_input_is_refused_before_anything_is_measured(
    run: Path, text_file: Path, tiny_transformer: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def measured(*given: Any, **named: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("supra_core.runtime.backend.load", measured)
    out = tmp_path / "r.html"
    ask = ("report", run, "--out", out, "--data", text_file)
    assert "does not exist" in refused("report", tmp_path / "absent", "--out", out)
    assert "cannot be read" in refused(*ask, "--data", tmp_path / "absent.txt")
    assert "rename one" in refused(*ask, "--data", text_file)
    assert "absent" in refused(*ask, "--teacher", tmp_path / "absent")
    assert "not a transformer" in refused(*ask, "--teacher", run)
    assert "exclude" in refused(*ask, "--teacher", tiny_transformer, "--no-teacher")
    assert "--limit" in refused(*ask, "--limit", "3")
    assert "--seed" in refused(*ask, "--seed", "-1")
    assert "unknown backend" in refused(*ask, "--backend", "wonder")
    assert ".html" in refused("report", run, "--out", tmp_path / "page")
    (tmp_path / "bad.jsonl").write_text('{"query": "Q", "choices": ["a"], "gold": 0}')
    assert "line 1" in refused(*ask, "--data", tmp_path / "bad.jsonl")
    out.with_suffix(".json").write_text("{}")
    assert "--force" in refused(*ask)
    assert out.with_suffix(".json").read_text() == "{}"
    assert not out.exists()


def test_matplotlib_is_asked_for_in_one_sentence(
    run: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refused("report", run, "--out", tmp_path / "r.html", "--data", text_file)
    assert "supra-lm[report]" in message


def test_damaged_metrics_are_refused_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"config": {"sequence_length": 512}}')
    metrics = tmp_path / "metrics.jsonl"
    step = {"stage": "distill", "step": 1, "loss": 2.0, "tokens": 64}
    metrics.write_text(json.dumps(step) + '\n{"stage": "dist')
    found = read_curve(tmp_path)  # a line that a kill cut off
    assert found["stages"][0]["losses"] == [2.0]
    assert found["sequence_length"] == 512
    metrics.write_text('{"stage": "dist\n' + json.dumps(step))
    with pytest.raises(FormatError, match="line 1"):
        read_curve(tmp_path)
    wrong = (
        json.dumps({**step, "loss": "much"}),
        '{"stage": "uptrain", "loss": 1, "tokens": 1e999}',
        '{"stage": "uptrain", "loss": 1, "tokens": ' + "1" * 5000 + "}",
        r'{"stage": "\ud83d", "loss": 1, "tokens": 1}',
        "[" * 100_000,
        *(
            json.dumps({**step, name: odd})
            for name in ("loss", "tokens", "stage", "stage_index")
            for odd in ("1", None, True, [], {})
            if not (name == "stage" and odd == "1")
        ),
        *(json.dumps({"perplexity": odd, "tokens": 1}) for odd in ("1", None, [], True)),
        *(json.dumps({"teacher_perplexity": odd}) for odd in ("1", [], True)),
        *(json.dumps({**step, "tokens": odd}) for odd in (-1, 2**63, 1.5)),
        "5",
        "[]",
        "null",
        '"loss"',
    )
    for line in wrong:
        metrics.write_text(line + "\n" + json.dumps(step))
        with pytest.raises(FormatError, match="line 1"):
            read_curve(tmp_path)


def test_what_is_not_finite_is_not_drawn(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    step = {"stage": "distill", "step": 1, "loss": 2.0, "tokens": 64}
    lines: list[dict[str, Any]] = [step]
    for odd in (math.nan, math.inf, 10**400):
        lines += [{**step, "loss": odd}, {"perplexity": odd, "tokens": 1, "step": 1}]
        lines += [{**step, "stage": "uptrain", "loss": odd}, {"teacher_perplexity": odd}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = read_curve(tmp_path)
    assert [stage["losses"] for stage in found["stages"]] == [[2.0]]
    assert found["held_out"] == [] and found["teacher_perplexity"] is None


def test_steps_that_were_left_out_are_not_in_the_curves(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    step = {"stage": "distill", "step": 1, "loss": 2.0, "tokens": 64}
    left_out = {"left_out": "a spike", "step": 2, "tokens": 128}
    lines = [step, {**step, **left_out, "loss": None}, {**step, **left_out, "loss": 900.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (stage,) = read_curve(tmp_path)["stages"]
    assert stage["losses"] == [2.0]


def test_long_curves_are_averaged(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    steps = [
        {"stage": "uptrain", "step": n + 1, "loss": float(n), "tokens": 10 * (n + 1)}
        for n in range(1000)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    stage = read_curve(tmp_path)["stages"][0]
    assert (stage["steps"], stage["steps_per_point"]) == (1000, 3)
    assert stage["losses"][:2] == [1.0, 4.0]
    assert stage["tokens"][-1] == 10_000


def test_speeds_stand_by_their_context() -> None:
    """A teacher of few positions is timed after fewer tokens."""

    def timed(*contexts: int) -> dict[str, Any]:
        names = ("prefill", "decode")
        rates = {f"{name}{end}": 1.0 for name in names for end in ("", "_slowest", "_fastest")}
        return {"contexts": [{"context": context, **rates} for context in contexts]}

    found = {"student": timed(512, 2048), "teacher": timed(192, 512)}
    rows = probe_sections._speed_table(found).rows
    assert [row[0] for row in rows] == [
        f"{kind} {n} tokens" for kind in ("prefill of", "decode after")
        for n in ("192", "512", "2,048")
    ]  # fmt: skip
    absent = [[cell == ABSENT for cell in row[1:]] for row in rows[:3]]
    assert absent == [[True, False], [False, False], [False, True]]
    assert len(probe_sections._speed_table({"student": timed(512)}).rows) == 2


def test_windows_longer_than_the_teacher_reads_are_noted(
    report: tuple[dict[str, Any], Path, str],
) -> None:
    files = report[0]["quality"]["files"]
    for positions in (None, 64):
        beyond = {} if positions is None else {"beyond_positions": positions}
        changed = {
            name: {**file, "teacher": {**file["teacher"], **beyond}} for name, file in files.items()
        }
        section = {"quality": {"files": changed}, "model": report[0]["model"]}
        notes = model_sections.quality(section).notes
        assert any("teacher is a transformer of 64" in note for note in notes) == bool(positions)


def test_prompts_longer_than_a_model_reads_are_noted(
    report: tuple[dict[str, Any], Path, str],
) -> None:
    files = report[0]["quality"]["files"]
    name = next(name for name, file in files.items() if file["task"] == "multiple_choice")
    assert files[name]["student"]["cut_prompts"] == 0
    for cut in (0, 3):
        student = {**files[name]["student"], "cut_prompts": cut}
        changed = {**files, name: {**files[name], "student": student}}
        notes = model_sections.quality({**report[0], "quality": {"files": changed}}).notes
        said = f"{name}: 3 prompts are longer than the positions of the student"
        assert any(said in note for note in notes) == bool(cut)


def test_a_ratio_is_of_the_same_tokens(
    report: tuple[dict[str, Any], Path, str],
) -> None:
    files = report[0]["quality"]["files"]
    assert "same_tokens" not in files["text.txt"]["teacher"]
    ours = {"task": "perplexity", "perplexity": 4.0}
    for alike in (True, False):
        theirs = {**ours, "perplexity": 2.0, **({} if alike else {"same_tokens": False})}
        found = [{"files": {"a.txt": side}, "seconds": 0.0} for side in (ours, theirs)]
        section = measure._quality(*found)
        assert section["files"]["a.txt"]["ratio"] == (2.0 if alike else None)
        shown = model_sections.quality({"quality": section, "model": report[0]["model"]})
        assert any("a.txt: the teacher's tokenizer" in note for note in shown.notes) is not alike


def test_a_teacher_with_another_tokenizer_reads_the_same_text(
    run: Path, tiny_transformer: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    teacher = tmp_path / "letters"
    shutil.copytree(tiny_transformer, teacher)
    stated = json.loads((teacher / "tokenizer.json").read_text())
    stated["model"]["merges"] = []
    (teacher / "tokenizer.json").write_text(json.dumps(stated))
    settings = ReportSettings(
        str(run), tmp_path / "r.html", (text_file,), str(teacher), limit=64, quick=True
    )
    inputs = read_inputs(settings)
    found = [
        sides.SideMeasurement(side, inputs, settings.budget, 0, silent) for side in inputs.sides
    ]
    for one in found:
        # The text alone is of interest here.
        monkeypatch.setattr(one, "_on_text", lambda name: {})
        for name in ("permutations", "samples", "speed"):
            monkeypatch.setattr(one, f"_{name}", dict)
    student, theirs = (one.all()["quality"]["files"]["text.txt"] for one in found)
    assert theirs["same_tokens"] is False
    text = inputs.student.tokenizer.encode(text_file.read_text()).head(64)
    assert theirs["tokens"] == int(text.ends[-1]) - 1
    assert student["tokens"] == 63


def test_limits_and_lengths() -> None:
    def budget(**given: Any) -> Any:
        return ReportSettings("m", Path("r.html"), **given).budget

    assert budget().text_tokens == 20_480
    assert budget(limit=50_000).text_tokens == budget(limit=50_000).examples == 50_000
    assert budget(limit=100).layer_tokens == 100
    assert budget(quick=True, limit=50_000) == budget(quick=True)
    assert budget(quick=True, limit=100).examples == 20
    assert position_lengths(20_000, 8_192) == [2_048, 8_192]
    assert position_lengths(5_000, 8_192) == [2_048, 4_096]
    assert position_lengths(3_000, 8_192) == [2_048]
    assert position_lengths(300, 8_192) == [256]
    assert position_lengths(9, 8_192) == []
