"""The plots of report.html, each drawn twice: wide, and narrow for a phone. CSS shows the one that fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from markupsafe import Markup

from benchmarks.report import words
from benchmarks.report.schema import Point, Report, Spread
from benchmarks.report.svg import Canvas, Scale, ticks

SIDES = ("dense", "built")
LATENCIES = ("time_to_first_token", "inter_token_latency", "request_latency")
COMPARED = ("output_token_throughput", *LATENCIES)


def accuracy_against_size(report: Report) -> Markup:
    """Perplexity against bytes: dense, built, and the further Pareto points where there are any."""
    if not (report.accuracy and report.size):
        return Markup()
    return _both(lambda width: _accuracy_against_size(report, width), wide=460)


def latencies(report: Report) -> Markup:
    """Each latency's spread, dense above built, for every measured point."""
    names = [n for n in LATENCIES if any(n in p.dense and p.dense[n].p50 is not None for p in report.performance)]
    if not names:
        return Markup()
    wide = _both_of([_latency(report.performance, name, 300) for name in names])
    narrow = _both_of([_latency(report.performance, name, 340) for name in names])
    return Markup('<div class="wide panels">{}</div><div class="narrow">{}</div>').format(wide, narrow)


def throughput(report: Report) -> Markup:
    """Tokens a second against concurrency with their intervals, one panel a workload."""
    panels: dict[str, list[Point]] = {}
    for point in report.performance:
        if words.HEADLINE in point.dense:
            panels.setdefault(words.workload(point), []).append(point)
    return _both_of([_both(partial(_throughput, title, points), wide=460) for title, points in panels.items()])


def speedups(report: Report) -> Markup:
    """The paired ratio at each point with its interval, beside the line of no change; one panel a metric."""
    names = [name for name in COMPARED if any(name in point.speedup for point in report.performance)]
    ends = [1.1, 1 / 1.1]
    for speedup in (point.speedup[name] for point in report.performance for name in names if name in point.speedup):
        ends += speedup.interval or (speedup.ratio, speedup.ratio)
    domain = (min(end for end in ends if end > 0) * 0.99, max(ends) * 1.01)  # one for all panels, so that they compare
    wide = _both_of([_speedup(report.performance, name, 224, domain) for name in names])
    narrow = _both_of([_speedup(report.performance, name, 340, domain) for name in names])
    return Markup('<div class="wide panels">{}</div><div class="narrow">{}</div>').format(wide, narrow)


def _both(draw: Callable[[float], Markup], wide: float) -> Markup:
    return Markup('<div class="wide">{}</div><div class="narrow">{}</div>').format(draw(wide), draw(340))


def _both_of(drawn: Sequence[Markup]) -> Markup:
    return Markup("").join(drawn)


def _accuracy_against_size(report: Report, width: float) -> Markup:
    assert report.accuracy is not None
    assert report.size is not None
    spots = [(point.bytes, point.perplexity, point.label, "front") for point in report.pareto if not point.chosen]
    spots.append((report.size.dense_bytes, report.accuracy.dense.perplexity, "dense", "dense"))
    spots.append((report.size.built_bytes, report.accuracy.built.perplexity, "built", "built"))
    left, right, top, bottom = 52.0, width - 16, 24.0, 250.0
    most, worst = max(spot[0] for spot in spots), max(spot[1] for spot in spots)
    best = min(spot[1] for spot in spots)
    x = Scale(0, most * 1.12, left, right)
    margin = max((worst - best) * 0.25, best * 0.02)
    y = Scale(best - margin, worst + margin, bottom, top)
    canvas = Canvas(width, bottom + 44)
    _y_axis(canvas, y, left, right)
    scale, unit = next((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if most >= s)
    for tick in ticks(0, x.high / scale, 4):
        canvas.text(x(tick * scale), bottom + 18, words.tick(tick), "tick", "middle")
    canvas.line(left, bottom, right, bottom, "axis")
    canvas.text(right, bottom + 36, f"size of the weights, {unit}", "label", "end")
    canvas.text(0, 11, "perplexity; lower left is better", "label")
    front = sorted((size, perplexity) for size, perplexity, _, _ in spots)
    if len(front) > 2:
        canvas.path([(x(size), y(perplexity)) for size, perplexity in front], "front-line")
    for size, perplexity, label, kind in spots:
        said = f"{label}: {words.amount(size)}, perplexity {words.number(perplexity, 4)}"
        canvas.circle(x(size), y(perplexity), 4 if kind == "front" else 6.5, kind, said)
    for size, perplexity, label, kind in spots[-2:]:
        end, below = x(size) > width * 0.7, 20 if perplexity == best else -12
        name = f"{label} {words.number(perplexity, 4)}"
        canvas.text(
            x(size) + (6 if end else 0), y(perplexity) + below, name, f"name {kind}-text", "end" if end else "start"
        )
    return canvas.svg(
        "Perplexity against size: "
        + "; ".join(f"{label} {words.amount(size)} at {words.number(p, 4)}" for size, p, label, _ in spots)
    )


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
    canvas.text(0, 13, f"{words.TITLES[name]}, {spreads[0].unit or 'ms'}", "title")
    for tick in ticks(x.low, x.high, 4):
        canvas.line(x(tick), top - 8, x(tick), bottom, "grid")
        canvas.text(x(tick), bottom + 16, words.tick(tick), "tick", "middle")
    for index, (point, label) in enumerate(zip(points, labels, strict=True)):
        y = top + index * pitch + 8
        canvas.text(0, y + 14, label, "tick")
        for side, down in zip(SIDES, (0, 20), strict=True):
            said = f"{side}, {words.workload(point)}, concurrency {point.concurrency}"
            _spread(canvas, x, y + down, side, getattr(point, side)[name], said)
    if near:
        canvas.text(right, bottom + 32, "axis does not start at 0", "label", "end")
    said = "; ".join(
        f"{side} at concurrency {point.concurrency}: median {words.number(getattr(point, side)[name].p50)}, "
        f"p99 {words.number(getattr(point, side)[name].p99)}"
        for point in points
        for side in SIDES
    )
    return canvas.svg(f"{words.TITLES[name]} in ms. {said}")


def _spread(canvas: Canvas, x: Scale, y: float, side: str, spread: Spread, label: str) -> None:
    """p5 to p95 as a line, the middle half as a box, the median as a notch, p99 as a ring."""
    p50, p99 = spread.p50 or spread.mean, _top(spread)
    p5, p25 = spread.p5 or p50, spread.p25 or p50
    p75, p95 = spread.p75 or p50, spread.p95 or p50
    canvas.line(x(p5), y, x(p95), y, f"whisker {side}-line")
    title = f"{label}: median {words.number(p50)}, p95 {words.number(p95)}, p99 {words.number(p99)} {spread.unit}"
    canvas.rect(x(p25), y - 6, max(x(p75) - x(p25), 2), 12, f"box {side}", title)
    canvas.line(x(p50), y - 8, x(p50), y + 8, "median")
    canvas.circle(x(p99), y, 3, f"ring {side}-line", title)


def _top(spread: Spread) -> float:
    return spread.p99 or spread.p95 or spread.p50 or spread.mean


def _throughput(title: str, points: Sequence[Point], width: float) -> Markup:
    left, right, top, bottom = 52.0, width - 16, 44.0, 250.0
    points = sorted(points, key=lambda point: point.concurrency)
    canvas = Canvas(width, bottom + 44)
    spreads = [getattr(point, side)[words.HEADLINE] for point in points for side in SIDES]
    high = max(max(spread.mean, (spread.interval or (0, 0))[1]) for spread in spreads)
    y = Scale(0, high * 1.1, bottom, top)
    _y_axis(canvas, y, left, right)
    canvas.line(left, bottom, right, bottom, "axis")
    canvas.text(0, 13, "output tokens/s", "title")
    canvas.text(right, 13, title, "label", "end")
    step = (right - left) / len(points)
    for side, shift in zip(SIDES, (-5, 5), strict=True):
        spots = []
        for index, point in enumerate(points):
            spread = getattr(point, side)[words.HEADLINE]
            place = left + (index + 0.5) * step + shift
            spots.append((place, y(spread.mean)))
            if spread.interval:
                _whisker(canvas, place, y(spread.interval[0]), y(spread.interval[1]), f"whisker {side}-line")
        if len(spots) > 1:
            canvas.path(spots, f"curve {side}-line")
        for (place, level), point in zip(spots, points, strict=True):
            spread = getattr(point, side)[words.HEADLINE]
            canvas.circle(
                place,
                level,
                5,
                side,
                f"{side}, concurrency {point.concurrency}: "
                f"{words.number(spread.mean)} {words.interval(spread.interval)} tokens/s",
            )
    for index, point in enumerate(points):
        canvas.text(left + (index + 0.5) * step, bottom + 18, str(point.concurrency), "tick", "middle")
    canvas.text(right, bottom + 36, "concurrency", "label", "end")
    said = "; ".join(
        f"concurrency {p.concurrency}: dense {words.number(p.dense[words.HEADLINE].mean)}, "
        f"built {words.number(p.built[words.HEADLINE].mean)}"
        for p in points
    )
    return canvas.svg(f"Output tokens a second, {title}. {said}")


def _speedup(points: Sequence[Point], name: str, width: float, domain: tuple[float, float]) -> Markup:
    rows = [(point, point.speedup[name]) for point in points if name in point.speedup and point.speedup[name].ratio > 0]
    labels = _labels([point for point, _ in rows])
    left, right, top, pitch = 14 + 7.2 * max(map(len, labels)), width - 14, 40.0, 19.0
    bottom = top + len(rows) * pitch
    canvas = Canvas(width, bottom + 26)
    x = Scale(*domain, left, right, log=True)
    canvas.text(0, 13, words.TITLES[name], "title")
    for tick in _ratio_ticks(x.low, x.high):
        canvas.line(x(tick), top - 8, x(tick), bottom, "even" if tick == 1 else "grid")
        canvas.text(x(tick), bottom + 16, f"{tick:g}x", "tick", "middle")
    canvas.text(x(1) - 5, top - 9, "slower", "label", "end")
    canvas.text(x(1) + 5, top - 9, "faster", "label")
    for index, ((point, speedup), label) in enumerate(zip(rows, labels, strict=True)):
        y = top + (index + 0.5) * pitch
        kind = words.mood(speedup) or "unclear"
        if speedup.interval:
            canvas.line(x(speedup.interval[0]), y, x(speedup.interval[1]), y, f"bar {kind}-line")
        said = (
            f"concurrency {point.concurrency}: {words.times(speedup.ratio)} {words.interval(speedup.interval, 'times')}"
        )
        canvas.circle(x(speedup.ratio), y, 4.5, kind, said)
        canvas.text(0, y + 4, label, "tick")
    said = "; ".join(f"{words.times(s.ratio)} at concurrency {p.concurrency}" for p, s in rows)
    return canvas.svg(f"Speed-up in {words.TITLES[name]}, build against dense: {said}")


def _labels(points: Sequence[Point]) -> list[str]:
    """`c=4`, with the lengths in front where the points differ in them."""
    several = len({words.workload(point) for point in points}) > 1
    return [f"{words.lengths(p)} c={p.concurrency}" if several else f"c={p.concurrency}" for p in points]


def _ratio_ticks(low: float, high: float) -> list[float]:
    wide = [0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    fine = [0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0, 2.5, 3.0]
    inside = [tick for tick in fine if low <= tick <= high]
    if len(inside) > 7 or not inside:
        inside = [tick for tick in wide if low <= tick <= high]
    return sorted({*inside, 1.0})


def _y_axis(canvas: Canvas, y: Scale, left: float, right: float) -> None:
    for tick in ticks(y.low, y.high, 5):
        canvas.line(left, y(tick), right, y(tick), "grid")
        canvas.text(left - 8, y(tick) + 4, words.tick(tick), "tick", "end")


def _whisker(canvas: Canvas, x: float, low: float, high: float, kind: str) -> None:
    canvas.line(x, low, x, high, kind)
    canvas.line(x - 4, low, x + 4, low, kind)
    canvas.line(x - 4, high, x + 4, high, kind)
