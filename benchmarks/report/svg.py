"""A small canvas for inline SVG. Colours come from the page's CSS classes, so that light and dark are one picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to pixels in [start, end], evenly or by their logarithm."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        place = math.log if self.log else float
        share = (place(value) - place(self.low)) / (place(self.high) - place(self.low))
        return self.start + share * (self.end - self.start)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (steps of 1, 2 or 5) from low to high."""
    raw = (high - low) / max(count, 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass
class Canvas:
    """Collects marks; `str(canvas.svg(...))` is the picture. Coordinates in pixels from the upper left."""

    width: float
    height: float
    parts: list[str] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>')

    def rect(self, x: float, y: float, width: float, height: float, kind: str, title: str = "") -> None:
        shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" rx="2" class="{kind}"'
        self._mark(shape, "rect", title)

    def circle(self, x: float, y: float, radius: float, kind: str, title: str = "") -> None:
        self._mark(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{kind}"', "circle", title)

    def path(self, points: Sequence[tuple[float, float]], kind: str) -> None:
        corners = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        self.parts.append(f'<path d="M{corners}" class="{kind}"/>')

    def text(self, x: float, y: float, label: str, kind: str = "", anchor: str = "start") -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(label)}</text>')

    def _mark(self, shape: str, name: str, title: str) -> None:
        self.parts.append(f"{shape}><title>{escape(title)}</title></{name}>" if title else f"{shape}/>")

    def svg(self, label: str, kind: str = "") -> Markup:
        """The picture; `label` describes it for readers who do not see it."""
        return Markup(
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" width="{self.width:g}" height="{self.height:g}" '
            f'role="img" aria-label="{escape(label)}" class="{kind}">' + "".join(self.parts) + "</svg>"
        )


NARROW = 340.0  # pixels, for a phone


def responsive(draws: Sequence[Callable[[float], Markup]], wide: float) -> Markup:
    """Each picture drawn `wide` and again narrow; CSS shows the one that fits."""
    rows = [Markup("").join(draw(width) for draw in draws) for width in (wide, NARROW)]
    return Markup('<div class="wide panels">{}</div><div class="narrow">{}</div>').format(*rows)
