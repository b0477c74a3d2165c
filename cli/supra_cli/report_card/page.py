"""The record as one HTML page that needs nothing beside it."""

from __future__ import annotations

from typing import Any

from supra_cli.report_card import model_sections, probe_sections
from supra_cli.report_card.parts import Section

_SECTIONS = (
    model_sections.quality,
    model_sections.training,
    model_sections.layer_errors,
    model_sections.positions,
    model_sections.variants,
    probe_sections.recall,
    probe_sections.permutations,
    probe_sections.samples,
    probe_sections.cost,
)
TEMPLATE = "page.html.j2"


def sections(record: dict[str, Any]) -> list[Section]:
    """Every part of the page, in its order; a part without figures says why."""
    return [section(record) for section in _SECTIONS]


def render(record: dict[str, Any]) -> str:
    """The page of a record with its origin."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("supra_cli.report_card", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    template = environment.get_template(TEMPLATE)
    return template.render(
        record=record, sections=sections(record), subject=subject(record), origin=_origin(record)
    )


def subject(record: dict[str, Any]) -> str:
    """The model's name: where it came from, and how."""
    model = record["model"]
    source = model["source"] or model["path"]
    return f"{source}, recipe {model['recipe']}" if model["recipe"] else str(source)


def _origin(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What was reported on, and where and how it was measured."""
    model, settings = record["model"], record["settings"]
    rows = [("student", _model(model))]
    if record["teacher"] is None:
        rows.append(("teacher", "none: it is not known here, or was not measured"))
    else:
        rows.append(("teacher", _model(record["teacher"])))
    machine = record["machine"]
    versions = [f"{name} {machine[name]}" for name in _PACKAGES if machine.get(name)]
    size = "quick" if settings["quick"] else "full"
    limit = f", limit {settings['limit']:,}" if settings["limit"] else ""
    return [
        *rows,
        ("data", ", ".join(file["name"] for file in record["data"])),
        ("command", record["command"]),
        ("extent", f"{size}{limit}, seed {settings['seed']}, {record['seconds']:,.0f} s"),
        (
            "machine",
            f"{machine['system']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        ),
        ("versions", ", ".join([f"Python {machine['python']}", *versions])),
        ("date", record["date"]),
    ]


_PACKAGES = ("supra", "torch", "mlx", "transformers")


def _model(model: dict[str, Any]) -> str:
    layers = ", ".join(
        f"{number} {kind.replace('_', ' ')}" for kind, number in model["layers"].items()
    )
    windows = [str(window) for window in model["windows"] if window]
    window = f" (window {', '.join(windows)})" if windows else ""
    trained = f", {model['trained_tokens']:,} tokens trained" if model["trained_tokens"] else ""
    return (
        f"{model['path']}: {model['parameters']:,} parameters, {layers}{window}{trained}; "
        f"{model['dtype']}, backend {model['backend']}, {model['form']} form"
    )
