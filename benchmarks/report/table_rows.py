"""Rows for the pages' tables, from the report."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from benchmarks.report.schema import Layer, Report


def group_layers(layers: list[Layer]) -> list[Layer]:
    """One row for the layers of equal shape, format, sparsity, kernel and reason, in the order of their first one.

    Its name has `*` for the block's number; its bytes are of all `count` layers.
    """
    groups: dict[tuple[object, ...], list[Layer]] = defaultdict(list)
    for layer in layers:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name)
        key = (pattern, layer.out_features, layer.in_features, layer.format, layer.sparse, layer.kernel, layer.reason)
        groups[key].append(layer)
    rows = []
    for (name, *_), members in groups.items():
        row: dict[str, Any] = {"name": name if len(members) > 1 else members[0].name, "count": len(members)}
        row["zeros"] = _mean([layer.zeros for layer in members])
        row["dense_bytes"] = _sum([layer.dense_bytes for layer in members])
        row["built_bytes"] = _sum([layer.built_bytes for layer in members])
        rows.append(members[0].model_copy(update=row))
    return rows


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _sum(values: list[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


@dataclass(frozen=True)
class Prediction:
    """The ceilings of one GPU and phase: tokens a second of both sides, their ratio, and what bounds them."""

    gpu: str
    phase: str
    load: str
    dense: float | None
    built: float | None
    ratio: float | None
    bound: str


def predictions(report: Report) -> list[Prediction]:
    """A row for each GPU and phase that the report predicts."""
    cards = report.predicted if isinstance(report.predicted, list) else [report.predicted or {}]
    rows = []
    for card in cards:
        context = card.get("context")
        for phase, load in (
            ("decode", f"batch {card.get('batch')}, context {context}"),
            ("prefill", f"{context} tokens"),
        ):
            sides = card.get(phase) or {}
            dense, built = sides.get("dense") or {}, sides.get("built") or {}
            if dense or built:
                above, below = built.get("tokens_per_second"), dense.get("tokens_per_second")
                ratio = above / below if above and below else None
                rows.append(
                    Prediction(str(card.get("gpu", "?")), phase, load, below, above, ratio, _bound(dense, built))
                )
    return rows


def _bound(dense: dict[str, Any], built: dict[str, Any]) -> str:
    refused = built.get("reason") or dense.get("reason")
    if refused:
        return str(refused)
    bounds = [side.get("bound") or "?" for side in (dense, built)]
    text = bounds[0] if bounds[0] == bounds[1] else f"{bounds[0]} (dense), {bounds[1]} (built)"
    if "memory" in bounds and (dense.get("fits_l2") or built.get("fits_l2")):
        return f"{text}; but weights this small fit the L2 cache, so this is not a real limit"
    return text


def machine(report: Report) -> list[tuple[str, str]]:
    """The device and the environment it was measured in, each fact once."""
    environment = {key: value for key, value in report.environment.items() if value != report.device}
    return flatten(report.device) + flatten(environment)


def flatten(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value) rows."""
    rows: list[tuple[str, str]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            rows += flatten(value, f"{prefix}{key}.")
        elif value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((f"{prefix}{key}", text))
    return rows
