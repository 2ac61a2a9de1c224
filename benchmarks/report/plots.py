"""Accuracy against size, and throughput against concurrency.

Each plot is drawn twice, wide and narrow for a phone; CSS shows the one that fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from markupsafe import Markup

from benchmarks.report import formatting
from benchmarks.report.schema import Point, Report
from benchmarks.report.svg import Canvas, Scale, responsive, ticks

SIDES = ("dense", "built")


class Spot(NamedTuple):
    """One model: its size, its perplexity, its name, and the CSS class it is drawn with."""

    bytes: int
    perplexity: float
    label: str
    kind: str


def accuracy_against_size(report: Report) -> Markup:
    """Perplexity against bytes: dense, built, and the further Pareto points where there are any."""
    spots = _spots(report)
    return responsive([partial(_accuracy_against_size, spots)], wide=460) if spots else Markup()


def _spots(report: Report) -> list[Spot]:
    """The dense model and the build last; nothing where either was not measured."""
    if not (report.accuracy and report.size):
        return []
    dense, built = report.accuracy.dense.perplexity, report.accuracy.built.perplexity
    if dense is None or built is None:
        return []
    spots = [Spot(point.bytes, point.perplexity, point.label, "front") for point in report.pareto if not point.chosen]
    spots.append(Spot(report.size.dense_bytes, dense, "dense", "dense"))
    spots.append(Spot(report.size.built_bytes, built, "built", "built"))
    return spots


def throughput(report: Report) -> Markup:
    """Tokens a second against concurrency with their intervals, one panel a workload."""
    panels: dict[str, list[Point]] = {}
    for point in report.performance:
        if formatting.HEADLINE in point.dense:
            panels.setdefault(formatting.workload(point), []).append(point)
    return responsive([partial(_throughput, title, points) for title, points in panels.items()], wide=460)


def _accuracy_against_size(spots: Sequence[Spot], width: float) -> Markup:
    left, right, top, bottom = 52.0, width - 16, 24.0, 250.0
    most, worst = max(spot[0] for spot in spots), max(spot[1] for spot in spots)
    best = min(spot[1] for spot in spots)
    x = Scale(0, most * 1.12, left, right)
    margin = max((worst - best) * 0.25, best * 0.02)
    y = Scale(best - margin, worst + margin, bottom, top)
    canvas = Canvas(width, bottom + 44)
    y_axis(canvas, y, left, right)
    scale, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if most >= s)
    for tick in ticks(0, x.high / scale, 4):
        canvas.text(x(tick * scale), bottom + 18, formatting.tick(tick), "tick", "middle")
    canvas.line(left, bottom, right, bottom, "axis")
    canvas.text(right, bottom + 36, f"size of the weights, {unit}", "label", "end")
    canvas.text(0, 11, "perplexity; lower left is better", "label")
    front = sorted((size, perplexity) for size, perplexity, _, _ in spots)
    if len(front) > 2:
        canvas.path([(x(size), y(perplexity)) for size, perplexity in front], "front-line")
    for size, perplexity, label, kind in spots:
        title = f"{label}: {formatting.amount(size)}, perplexity {formatting.number(perplexity, 4)}"
        canvas.circle(x(size), y(perplexity), 4 if kind == "front" else 6.5, kind, title)
    for size, perplexity, label, kind in spots[-2:]:
        end, below = x(size) > width * 0.7, 20 if perplexity == best else -12
        name = f"{label} {formatting.number(perplexity, 4)}"
        canvas.text(
            x(size) + (6 if end else 0), y(perplexity) + below, name, f"name {kind}-text", "end" if end else "start"
        )
    return canvas.svg(
        "Perplexity against size: "
        + "; ".join(f"{label} {formatting.amount(size)} at {formatting.number(p, 4)}" for size, p, label, _ in spots)
    )


def _throughput(title: str, points: Sequence[Point], width: float) -> Markup:
    left, right, top, bottom = 52.0, width - 16, 44.0, 250.0
    points = sorted(points, key=lambda point: point.concurrency)
    canvas = Canvas(width, bottom + 44)
    spreads = [getattr(point, side)[formatting.HEADLINE] for point in points for side in SIDES]
    high = max(max(spread.mean, (spread.interval or (0, 0))[1]) for spread in spreads)
    y = Scale(0, high * 1.1, bottom, top)
    y_axis(canvas, y, left, right)
    canvas.line(left, bottom, right, bottom, "axis")
    canvas.text(0, 13, "output tokens/s", "title")
    canvas.text(right, 13, title, "label", "end")
    step = (right - left) / len(points)
    for side, shift in zip(SIDES, (-5, 5), strict=True):
        spots = []
        for index, point in enumerate(points):
            spread = getattr(point, side)[formatting.HEADLINE]
            place = left + (index + 0.5) * step + shift
            spots.append((place, y(spread.mean)))
            if spread.interval:
                _whisker(canvas, place, y(spread.interval[0]), y(spread.interval[1]), f"whisker {side}-line")
        if len(spots) > 1:
            canvas.path(spots, f"curve {side}-line")
        for (place, level), point in zip(spots, points, strict=True):
            spread = getattr(point, side)[formatting.HEADLINE]
            canvas.circle(
                place,
                level,
                5,
                side,
                f"{side}, concurrency {point.concurrency}: "
                f"{formatting.number(spread.mean)} {formatting.interval(spread.interval)} tokens/s",
            )
    for index, point in enumerate(points):
        canvas.text(left + (index + 0.5) * step, bottom + 18, str(point.concurrency), "tick", "middle")
    canvas.text(right, bottom + 36, "concurrency", "label", "end")
    summary_text = "; ".join(
        f"concurrency {p.concurrency}: dense {formatting.number(p.dense[formatting.HEADLINE].mean)}, "
        f"built {formatting.number(p.built[formatting.HEADLINE].mean)}"
        for p in points
    )
    return canvas.svg(f"Output tokens a second, {title}. {summary_text}")


def y_axis(canvas: Canvas, y: Scale, left: float, right: float) -> None:
    """Draws the levels of a plot's ticks, with their numbers."""
    for tick in ticks(y.low, y.high, 5):
        canvas.line(left, y(tick), right, y(tick), "grid")
        canvas.text(left - 8, y(tick) + 4, formatting.tick(tick), "tick", "end")


def _whisker(canvas: Canvas, x: float, low: float, high: float, kind: str) -> None:
    canvas.line(x, low, x, high, kind)
    canvas.line(x - 4, low, x + 4, low, kind)
    canvas.line(x - 4, high, x + 4, high, kind)
