"""The head of the report: the verdict in one sentence, its marks, and the four cards."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.report import formatting
from benchmarks.report.schema import Report, Speedup


@dataclass(frozen=True)
class Card:
    """One figure of the summary. `mood` is a CSS class: good, bad or none."""

    name: str
    value: str
    detail: str
    mood: str = ""


@dataclass(frozen=True)
class Chip:
    """A short mark; `strong` ones are highlighted."""

    text: str
    strong: bool = False


def verdict(report: Report) -> str:
    """One sentence: size, accuracy, speed; a failed gate comes first."""
    parts = []
    if report.size:
        parts.append(_smaller(report))
    if report.accuracy:
        parts.append(f"perplexity {formatting.percent(report.accuracy.perplexity_increase, signed=True)}")
    if (sentence := _speed(report)) is not None:
        parts.append(sentence)
    text = ", ".join(parts).capitalize() if parts else "Nothing was measured"
    failed = len(report.failed_gates)
    return text if not failed else f"{'A gate' if failed == 1 else f'{failed} gates'} failed. {text}"


def _smaller(report: Report) -> str:
    assert report.size is not None
    ratio = report.size.dense_bytes / max(report.size.built_bytes, 1)
    return f"{formatting.times(ratio)} smaller" if ratio >= 1 else f"{formatting.times(1 / ratio)} larger"


def _speed(report: Report) -> str | None:
    """The conclusion on throughput that the intervals of all measured points allow."""
    speedups = [
        point.speedup[formatting.HEADLINE] for point in report.performance if formatting.HEADLINE in point.speedup
    ]
    if not speedups:
        return None
    verdicts = {formatting.judge(speedup) for speedup in speedups}
    if verdicts == {formatting.UNCLEAR}:
        return f"as fast as dense within the noise ({_range(speedups)})"
    return f"{_range(speedups)} as fast as dense"


def _range(speedups: list[Speedup]) -> str:
    low, high = (formatting.times(pick(speedup.ratio for speedup in speedups)) for pick in (min, max))
    return low if low == high else f"{low} to {high}"


def chips(report: Report) -> list[Chip]:
    """Format, sparsity, backend, device, and the class of the result."""
    rows = []
    formats = sorted({layer.format for layer in report.layers})
    if formats:
        rows.append(Chip(" + ".join(formats)))
    if report.pruned:
        sparse = sum(layer.sparse for layer in report.layers)
        rows.append(
            Chip(f"{report.pattern} in {sparse} of {len(report.layers)} layers" if report.layers else report.pattern)
        )
    if report.backend:
        rows.append(Chip(f"{report.backend} backend"))
    if report.device:
        rows.append(Chip(device(report)))
    if report.pruned:
        rows.append(Chip("MLPerf open class: pruned", strong=True))
    return rows


def cards(report: Report) -> list[Card]:
    """Perplexity, size, speed and gates; a part that was not measured is named."""
    return [_perplexity(report), _size(report), _throughput(report), _gates(report)]


def _perplexity(report: Report) -> Card:
    accuracy = report.accuracy
    if accuracy is None:
        return Card("Perplexity", "-", "not measured")
    bounds = accuracy.perplexity_increase_interval
    dense, built = (formatting.number(side.perplexity, 4) for side in (accuracy.dense, accuracy.built))
    detail = f"{dense} dense, {built} built"
    detail += f"\n95% interval {formatting.interval(bounds, 'percent')}" if bounds else ""
    return Card("Perplexity", formatting.percent(accuracy.perplexity_increase, signed=True), detail)


def _size(report: Report) -> Card:
    size = report.size
    if size is None:
        return Card("Size", "-", "not measured")
    detail = f"{formatting.amount(size.dense_bytes)} dense, {formatting.amount(size.built_bytes)} built"
    return Card("Size", _smaller(report), detail)


def _throughput(report: Report) -> Card:
    name = "Speed, output tokens/s"
    points = [point for point in report.performance if formatting.HEADLINE in point.speedup]
    if not points:
        return Card(name, "-", "not measured")
    speedups = [point.speedup[formatting.HEADLINE] for point in points]
    rows = [
        f"c={point.concurrency}: {formatting.times(speedup.ratio)} {formatting.interval(speedup.interval, 'times')}"
        for point, speedup in zip(points, speedups, strict=True)
    ]
    moods = {formatting.mood(speedup) for speedup in speedups}
    return Card(
        name,
        _range(speedups),
        "\n".join(rows if len(rows) <= 4 else [*rows[:3], "..."]),
        moods.pop() if len(moods) == 1 else "",
    )


def _gates(report: Report) -> Card:
    total, failed = len(report.gates), report.failed_gates
    if not total:
        return Card("Gates", "none set", "no limit on accuracy or speed was set")
    if failed:
        return Card("Gates", f"{len(failed)} of {total} failed", ", ".join(gate.name for gate in failed), "bad")
    return Card("Gates", f"{total} of {total} passed", ", ".join(gate.name for gate in report.gates), "good")


def device(report: Report) -> str:
    """The device's name and, of a CPU, its cores, as the build recorded them."""
    name = str(report.device.get("name") or report.device.get("type") or "an unnamed device")
    return f"{name}, {report.device['cores']} cores" if report.device.get("cores") else name


def limits(report: Report) -> list[str]:
    """The share of its device's limit that each point reached, where the limit is known."""
    return [str(point.limit["message"]) for point in report.performance if point.limit and point.limit.get("message")]
