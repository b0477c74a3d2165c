"""The report's figures as inline SVG that can be read without colours, in light and in dark."""

from __future__ import annotations

import re
from collections.abc import Iterable
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from supra_cli.report_card.parts import found_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

# Everything drawn in this colour takes the page's text colour; figures.mplstyle has it too.
_INK = "#010203"
_STUDENT = "#2f78b7"
# Which model a line or bar is of can be told by marker, dash and hatch alone.
_LINES: dict[str, dict[str, Any]] = {
    "student": {"color": _STUDENT, "linestyle": "-", "marker": "o", "markersize": 5},
    "teacher": {"color": _INK, "linestyle": "--", "marker": "s", "markersize": 4, "mfc": "none"},
}
_BARS: dict[str, dict[str, Any]] = {
    "student": {"facecolor": _STUDENT, "edgecolor": _INK},
    "teacher": {"facecolor": "none", "edgecolor": _INK, "hatch": "////"},
}
_SIZE = (7.2, 3.4)
_STYLE = Path(__file__).with_name("templates") / "figures.mplstyle"


def layer_errors(section: dict[str, Any]) -> str:
    """A bar for each linear layer."""
    with _style("layer_errors"):
        figure, (axes,) = _drawing()
        layers = [one["layer"] for one in section["layers"]]
        axes.bar(layers, [one["error"] for one in section["layers"]], **_BARS["student"], width=0.7)
        axes.axhline(section["mean"], color=_INK, linestyle=":", linewidth=1.2, label="mean")
        _legend(figure, axes)
        _label(axes, "Error of each linear layer", "layer", "relative squared error (no unit)")
        _whole_numbers(axes)
        return _svg(figure)


def training(section: dict[str, Any]) -> str:
    """One panel for each stage's loss, and one for the held-out perplexity."""
    with _style("training"):
        figure, panels = _drawing(len(section["stages"]) + bool(section["held_out"]))
        for axes, stage in zip(panels, section["stages"], strict=False):
            tokens = [value / 1000 for value in stage["tokens"]]
            axes.plot(tokens, stage["losses"], color=_STUDENT, linewidth=1.3)
            if len(tokens) == 1:
                axes.plot(tokens, stage["losses"], "o", color=_STUDENT)
            if min(stage["losses"]) > 0 and max(stage["losses"]) > 20 * min(stage["losses"]):
                axes.set_yscale("log")
            _label(axes, f"Stage {stage['stage']}", "thousand tokens", _UNITS.get(stage["stage"]))
        if section["held_out"]:
            _held_out(panels[-1], section)
            _legend(figure, panels[-1])
        return _svg(figure)


_UNITS = {
    "transfer": "relative squared error",
    "distill": "KL, nats a token",
    "uptrain": "cross entropy, nats a token",
}


def _held_out(axes: Axes, section: dict[str, Any]) -> None:
    tokens = [one["tokens"] / 1000 for one in section["held_out"]]
    values = [one["perplexity"] for one in section["held_out"]]
    axes.plot(tokens, values, label="student", **_LINES["student"])
    teacher = section["teacher_perplexity"]
    if teacher is not None:
        axes.axhline(teacher, color=_INK, linestyle="--", label="teacher")
    if max(values) > 10 * min(values):
        axes.set_yscale("log")
    _label(axes, "Held-out text", "thousand tokens", "perplexity")


def positions(section: dict[str, Any], trained_length: int | None) -> str:
    """One panel for each length of sequence."""
    found = found_of(section)
    lengths = sorted({curve["length"] for result in found.values() for curve in result["curves"]})
    with _style("positions"):
        figure, panels = _drawing(len(lengths))
        for axes, length in zip(panels, lengths, strict=True):
            for role, result in found.items():
                for curve in result["curves"]:
                    if curve["length"] == length:
                        # A bin stands at its geometric middle.
                        points = (
                            ((b["first"] * b["stop"]) ** 0.5, b["perplexity"], b["low"], b["high"])
                            for b in curve["bins"]
                        )
                        _curve(axes, role, points)
            if trained_length is not None and trained_length < length:
                axes.axvline(trained_length, color=_INK, linestyle=":", label="trained length")
            _powers(axes)
            title = f"Sequences of {length:,} tokens"
            _label(axes, title, "position in the sequence, tokens", "perplexity")
        _legend(figure, panels[-1])
        return _svg(figure)


def _curve(axes: Axes, role: str, points: Iterable[tuple[float, float, float, float]]) -> None:
    """A model's line through points of a place, a value, and the bounds of the value."""
    places, values, lows, highs = map(np.array, zip(*points, strict=True))
    errors = (values - lows, highs - values)
    axes.errorbar(places, values, errors, label=role, capsize=2.5, **_LINES[role])


def distances(recall: dict[str, Any], copying: dict[str, Any]) -> str:
    """Recall and copying beside each other."""
    panels_of = [("Recall of a value by its key", recall), ("Copying of random words", copying)]
    present = [(title, found) for title, section in panels_of if (found := found_of(section))]
    with _style("distances"):
        figure, panels = _drawing(len(present))
        for axes, (title, found) in zip(panels, present, strict=True):
            for role, result in found.items():
                shares = [(one["among"], *one["among_interval"]) for one in result["distances"]]
                places = [one["distance"] for one in result["distances"]]
                percents = (100 * np.array(shares)).T
                _curve(axes, role, zip(places, *percents, strict=True))
                chance = 100 * result["by_chance"]
            axes.axhline(chance, color=_INK, linestyle=":", linewidth=1.2, label="chance")
            axes.set_ylim(-3, 103)
            _powers(axes)
            _label(axes, title, "distance, tokens", "right among candidates, %")
        _legend(figure, panels[-1])
        return _svg(figure)


def letters(section: dict[str, Any]) -> str:
    """How often each letter was chosen."""
    both = found_of(section)
    with _style("letters"):
        figure, (axes,) = _drawing()
        width = 0.8 / len(both)
        for place, (role, result) in enumerate(both.items()):
            names = [one["letter"] for one in result["letters"]]
            where = [index + (place - (len(both) - 1) / 2) * width for index in range(len(names))]
            chosen = [100 * one["chosen"] for one in result["letters"]]
            axes.bar(where, chosen, width, label=role, **_BARS[role])
            axes.set_xticks(range(len(names)), names)
        even = [100 * one["even"] for one in result["letters"]]
        for index, value in enumerate(even):
            label = None if index else "no preference"
            ends = (index - 0.48, index + 0.48)
            axes.plot(ends, (value, value), color=_INK, linestyle=":", label=label)
        axes.grid(axis="x", visible=False)
        _legend(figure, axes)
        _label(axes, "Letters chosen", "letter", "share of the answers, %")
        return _svg(figure)


def memory(section: dict[str, Any]) -> str:
    """State against KV cache."""
    with _style("memory"):
        figure, (axes,) = _drawing()
        contexts = [one["context"] for one in section["contexts"]]
        for role, key, label in (
            ("student", "student_bytes", "this model's state"),
            ("teacher", "transformer_bytes", "transformer's KV cache, 16 bit"),
        ):
            values = [one[key] / 2**20 for one in section["contexts"]]
            axes.plot(contexts, values, label=label, **_LINES[role])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _powers(axes)
        _legend(figure, axes)
        _label(axes, "Memory for one sequence", "context, tokens", "MiB")
        return _svg(figure)


def _style(name: str) -> Any:
    """The settings of one figure; ``name`` keeps the ids in its SVG its own."""
    from matplotlib import rc_context

    return rc_context({"svg.hashsalt": name}, _STYLE)


def _drawing(panels: int = 1) -> tuple[Drawing, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)
    return figure, list(axes[0])


def _legend(figure: Drawing, axes: Axes) -> None:
    """One legend above all panels, where it hides nothing."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=4)


def _label(axes: Axes, title: str, x: str, y: str | None) -> None:
    axes.set_title(title, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y or "loss")
    axes.set_axisbelow(True)


def _powers(axes: Axes) -> None:
    """Powers of two along x, written out."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1024:g}k" if x >= 1024 else f"{x:g}")
    )


def _whole_numbers(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))


def _svg(figure: Drawing) -> str:
    """The SVG element alone, without namespaces or metadata, which HTML needs none of."""
    out = StringIO()
    nothing: dict[str, Any] = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace("xlink:href", "href").replace(_INK, "currentColor")
