"""Figures as text, the same for every page."""

from __future__ import annotations

from benchmarks.report.schema import Interval, Point, Speedup

TITLES = {
    "time_to_first_token": "time to first token",
    "inter_token_latency": "inter-token latency",
    "request_latency": "request latency",
    "output_token_throughput_per_user": "tokens/s per user",
    "output_token_throughput": "output token throughput",
    "request_throughput": "request throughput",
    "goodput": "goodput",
}
HEADLINE = "output_token_throughput"
SHOWN = ("output_token_throughput", "time_to_first_token", "inter_token_latency", "request_latency", "goodput")
UNCLEAR = "no clear difference"


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, with no exponent: 1234 -> 1,234; 0.01234 -> 0.0123."""
    if value is None or value != value:
        return "-"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:#.{digits}g}".rstrip(".")
    return f"{value:.{digits + 3}f}" if "e" in text else text


def tick(value: float) -> str:
    """A round value of an axis: 1500 -> 1,500; 0.5 -> 0.5."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:g}"


def amount(size: float | None) -> str:
    """Bytes in decimal units: 1.53 GB."""
    if size is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}" if size < 100 * scale else f"{size / scale:.0f} {unit}"
    return f"{size:.0f} B"


def percent(share: float | None, signed: bool = False) -> str:
    """0.1234 -> 12.3%."""
    if share is None:
        return "-"
    digits = 1 if abs(share) < 1 else 0
    return f"{share * 100:+.{digits}f}%" if signed else f"{share * 100:.{digits}f}%"


def times(ratio: float | None) -> str:
    """1.2345 -> 1.23x."""
    return "-" if ratio is None else f"{ratio:.2f}x" if ratio < 100 else f"{ratio:,.0f}x"


def interval(bounds: Interval, show: str = "number") -> str:
    """The bounds in brackets, or that there are none."""
    if bounds is None:
        return "no interval"
    low, high = (_bound(value, show) for value in bounds)
    return f"[{low}, {high}]"


def _bound(value: float, show: str) -> str:
    if show == "percent":
        return percent(value, signed=True)
    if show == "times":  # a third decimal where the second hides on which side of 1 the bound lies
        return f"{value:.3f}" if f"{value:.2f}" == "1.00" else f"{value:.2f}"
    return number(value)


def judge(speedup: Speedup) -> str:
    """What the interval shows: `faster`, `slower`, or `no clear difference`."""
    if speedup.interval is None or speedup.interval[0] <= 1 <= speedup.interval[1]:
        return UNCLEAR
    return "faster" if speedup.ratio > 1 else "slower"


def workload(point: Point) -> str:
    """128 in, 64 out."""
    return f"{point.workload.get('input_tokens', '?')} in, {point.workload.get('output_tokens', '?')} out"


def shown(point: Point) -> list[str]:
    """The metrics of a point that the pages list; the others follow from them and are in report.json."""
    return [name for name in SHOWN if name in point.speedup]


def few(points: list[Point]) -> bool:
    """Whether some point has too few requests for a 99th percentile."""
    return any(point.requests is not None and point.requests < 100 for point in points)


def lengths(point: Point) -> str:
    """128+64: the tokens in and out."""
    return f"{point.workload.get('input_tokens', '?')}+{point.workload.get('output_tokens', '?')}"


def mood(speedup: Speedup) -> str:
    """The CSS class of a speed-up: green or red only where the interval leaves out 1."""
    return {"faster": "good", "slower": "bad"}.get(judge(speedup), "")


def rank(speedup: Speedup, name: str) -> str:
    """The speed-up of one percentile, such as `p90`."""
    inner = getattr(speedup, name, None)
    return times(inner["ratio"]) if inner else "-"
