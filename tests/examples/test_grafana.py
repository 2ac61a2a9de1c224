"""The Grafana dashboard shows metrics that exist, and each of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

from calibration.routing.metrics import METRICS

DASHBOARD = Path(__file__).parents[2] / "examples" / "grafana" / "router.json"


def panels() -> list[dict]:
    return json.loads(DASHBOARD.read_text(encoding="utf8"))["panels"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def test_the_dashboard_shows_each_metric_and_no_other() -> None:
    shown = {name for expression in expressions() for name in re.findall(r"\btwofour_\w+", expression)}
    assert shown == METRICS.keys()


def test_counters_are_shown_as_rates_and_gauges_as_they_are() -> None:
    for expression in expressions():
        for name in re.findall(r"\btwofour_\w+", expression):
            assert (f"rate({name}[$__rate_interval])" in expression) == (METRICS[name][0] == "counter"), expression
        assert expression.count("(") == expression.count(")")


def test_panels_have_their_own_ids_and_places() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels()]
    assert len({panel["id"] for panel in panels()}) == len(set(places)) == len(panels())
    assert all(target["datasource"]["uid"] == "${datasource}" for panel in panels() for target in panel["targets"])
