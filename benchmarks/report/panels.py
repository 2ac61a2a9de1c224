"""Rows of small plots, one a metric: the paired speed-ups with their intervals, and the spread of each latency."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from markupsafe import Markup

from benchmarks.report import formatting
from benchmarks.report.schema import Point, Report, Spread
from benchmarks.report.svg import Canvas, Scale, responsive, ticks

SIDES = ("dense", "built")
LATENCIES = ("time_to_first_token", "inter_token_latency", "request_latency")
COMPARED = ("output_token_throughput", *LATENCIES)

LABEL_WIDTH = 34.0  # of a ratio below an axis, with its margin


def speedups(report: Report) -> Markup:
    """The paired ratio at each point with its interval, and the line of no change; one panel a metric."""
    names = [n for n in COMPARED if any(n in p.speedup and p.speedup[n].ratio > 0 for p in report.performance)]
    ends = [1.1, 1 / 1.1]
    for speedup in (point.speedup[name] for point in report.performance for name in names if name in point.speedup):
        ends += speedup.interval or (speedup.ratio, speedup.ratio)
    domain = (min(end for end in ends if end > 0) * 0.99, max(ends) * 1.01)  # one for all panels, so that they compare
    return responsive([partial(_speedup, report.performance, name, domain) for name in names], wide=224)


def latencies(report: Report) -> Markup:
    """Each latency's spread, dense above built, for every measured point."""
    names = [n for n in LATENCIES if any(n in p.dense and p.dense[n].p50 is not None for p in report.performance)]
    return responsive([partial(_latency, report.performance, name) for name in names], wide=300)


def _speedup(points: Sequence[Point], name: str, domain: tuple[float, float], width: float) -> Markup:
    rows = [(point, point.speedup[name]) for point in points if name in point.speedup and point.speedup[name].ratio > 0]
    labels = _labels([point for point, _ in rows])
    left, right, top, pitch = 14 + 7.2 * max(map(len, labels)), width - 14, 40.0, 19.0
    bottom = top + len(rows) * pitch
    canvas = Canvas(width, bottom + 26)
    x = Scale(*domain, left, right, log=True)
    canvas.text(0, 13, formatting.TITLES[name], "title")
    shown = _ratio_ticks(x.low, x.high)
    for tick in shown:
        canvas.line(x(tick), top - 8, x(tick), bottom, "even" if tick == 1 else "grid")
    for tick in _apart(shown, x):
        canvas.text(x(tick), bottom + 16, f"{tick:g}x", "tick", "middle")
    canvas.text(x(1) - 5, top - 9, "slower", "label", "end")
    canvas.text(x(1) + 5, top - 9, "faster", "label")
    for index, ((point, speedup), label) in enumerate(zip(rows, labels, strict=True)):
        y = top + (index + 0.5) * pitch
        kind = formatting.mood(speedup) or "unclear"
        if speedup.interval:
            canvas.line(x(speedup.interval[0]), y, x(speedup.interval[1]), y, f"bar {kind}-line")
        interval = formatting.interval(speedup.interval, "times")
        title = f"concurrency {point.concurrency}: {formatting.times(speedup.ratio)} {interval}"
        canvas.circle(x(speedup.ratio), y, 4.5, kind, title)
        canvas.text(0, y + 4, label, "tick")
    title = "; ".join(f"{formatting.times(s.ratio)} at concurrency {p.concurrency}" for p, s in rows)
    return canvas.svg(f"Speed-up in {formatting.TITLES[name]}, build against dense: {title}")


def _ratio_ticks(low: float, high: float) -> list[float]:
    wide = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    fine = [0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0]
    inside = [tick for tick in fine if low <= tick <= high]
    if len(inside) > 7 or not inside:
        inside = [tick for tick in wide if low <= tick <= high]
    return sorted({*inside, 1.0})


def _apart(ratios: Sequence[float], x: Scale) -> list[float]:
    """Those whose labels do not touch: 1, then the others by their distance from it."""
    labelled = [1.0]
    for ratio in sorted(ratios, key=lambda ratio: abs(x(ratio) - x(1))):
        if all(abs(x(ratio) - x(other)) >= LABEL_WIDTH for other in labelled):
            labelled.append(ratio)
    return labelled


def _latency(points: Sequence[Point], name: str, width: float) -> Markup:
    points = [point for point in points if name in point.dense and point.dense[name].p50 is not None]
    labels = _labels(points)
    left, right, top, pitch = 14 + 7.2 * max(map(len, labels)), width - 14, 32.0, 46.0
    bottom = top + len(points) * pitch
    canvas = Canvas(width, bottom + 36)
    spreads = [getattr(point, side)[name] for point in points for side in SIDES]
    low, high = min(s.p5 or s.mean for s in spreads), max(_top(s) for s in spreads)
    near = low > 0.5 * high  # all values far from zero: no need to show it
    x = Scale(max(low - 0.25 * (high - low), 0.9 * low) if near else 0, high + 0.06 * (high - low), left, right)
    canvas.text(0, 13, f"{formatting.TITLES[name]}, {spreads[0].unit or 'ms'}", "title")
    for tick in ticks(x.low, x.high, 4):
        canvas.line(x(tick), top - 8, x(tick), bottom, "grid")
        canvas.text(x(tick), bottom + 16, formatting.tick(tick), "tick", "middle")
    for index, (point, label) in enumerate(zip(points, labels, strict=True)):
        y = top + index * pitch + 8
        canvas.text(0, y + 14, label, "tick")
        for side, down in zip(SIDES, (0, 20), strict=True):
            title = f"{side}, {formatting.workload(point)}, concurrency {point.concurrency}"
            _spread(canvas, x, y + down, side, getattr(point, side)[name], title)
    if near:
        canvas.text(right, bottom + 32, "axis does not start at 0", "label", "end")
    title = "; ".join(
        f"{side} at concurrency {point.concurrency}: median {formatting.number(getattr(point, side)[name].p50)}, "
        f"p99 {formatting.number(getattr(point, side)[name].p99)}"
        for point in points
        for side in SIDES
    )
    return canvas.svg(f"{formatting.TITLES[name]} in ms. {title}")


def _spread(canvas: Canvas, x: Scale, y: float, side: str, spread: Spread, label: str) -> None:
    """p5 to p95 as a line, the middle half as a box, the median as a notch, p99 as a ring."""
    p50, p99 = spread.p50 or spread.mean, _top(spread)
    p5, p25 = spread.p5 or p50, spread.p25 or p50
    p75, p95 = spread.p75 or p50, spread.p95 or p50
    canvas.line(x(p5), y, x(p95), y, f"whisker {side}-line")
    numbers = (formatting.number(value) for value in (p50, p95, p99))
    title = f"{label}: " + "median {}, p95 {}, p99 {} ".format(*numbers) + spread.unit
    canvas.rect(x(p25), y - 6, max(x(p75) - x(p25), 2), 12, f"box {side}", title)
    canvas.line(x(p50), y - 8, x(p50), y + 8, "median")
    canvas.circle(x(p99), y, 3, f"ring {side}-line", title)


def _top(spread: Spread) -> float:
    return spread.p99 or spread.p95 or spread.p50 or spread.mean


def _labels(points: Sequence[Point]) -> list[str]:
    """`c=4`, with the lengths in front where the points differ in them."""
    several = len({formatting.workload(point) for point in points}) > 1
    return [f"{formatting.lengths(p)} c={p.concurrency}" if several else f"c={p.concurrency}" for p in points]
