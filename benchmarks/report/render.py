"""Writes the three forms of the report."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.report import formatting, panels, plots, routing_plot, summary, table_rows
from benchmarks.report.schema import Report
from plugins.common.files import replacing


def render(report: dict[str, Any], out: Path) -> None:
    """Writes report.json, report.md and report.html into `out`, made if missing.

    Raises pydantic.ValidationError, a ValueError, where `report` is not what `schema.Report` describes.
    """
    report = _plain(report)
    parsed = Report.model_validate(report)
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    _write(out / "report.md", _environment(html=False).get_template("report.md.j2").render(report=parsed))
    _write(out / "report.html", _environment(html=True).get_template("report.html.j2").render(report=parsed))


@cache
def _environment(html: bool) -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=html,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(
        formatting=formatting, summary=summary, tables=table_rows, plots=plots, panels=panels, routing_plot=routing_plot
    )
    for function in (formatting.number, formatting.amount, formatting.percent, formatting.times, formatting.interval):
        environment.filters[function.__name__] = function
    return environment


def _write(path: Path, text: str) -> None:
    """Through a temporary file, so that a reader never sees half a report."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf8")


def _plain(value: Any) -> Any:
    """What JSON can hold: dataclasses become objects, and NaN and infinity, which it lacks, become null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
