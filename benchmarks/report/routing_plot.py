"""The router's curve: loss against the share of requests on the build, with a random mix and an oracle."""

from __future__ import annotations

from functools import partial

from markupsafe import Markup

from benchmarks.report import formatting
from benchmarks.report.plots import y_axis
from benchmarks.report.schema import Routing
from benchmarks.report.svg import Canvas, Scale, responsive, ticks

CURVES = (  # field of a point, name, CSS classes
    ("random_loss", "random mix", "curve dense-line"),
    ("oracle_loss", "oracle", "front-line"),
    ("loss", "router", "curve built-line"),
)


def curve(routing: Routing) -> Markup:
    """The three curves, the router's intervals and the budget."""
    return responsive([partial(_curve, routing)], wide=460)


def _curve(routing: Routing, width: float) -> Markup:
    left, right, top, bottom = 58.0, width - 16, 44.0, 250.0
    highest = max([routing.budget_kl, *(max(point.random_loss, point.loss) for point in routing.curve)])
    x, y = Scale(0, 1, left, right), Scale(0, highest * 1.08, bottom, top)
    canvas = Canvas(width, bottom + 44)
    canvas.text(0, 13, "mean loss of all requests, nats per token", "title")
    y_axis(canvas, y, left, right)
    for tick in ticks(0, 1, 5):
        canvas.text(x(tick), bottom + 18, f"{tick:.0%}", "tick", "middle")
    canvas.line(left, bottom, right, bottom, "axis")
    canvas.text(right, bottom + 36, "share of requests on the build", "label", "end")
    canvas.line(left, y(routing.budget_kl), right, y(routing.budget_kl), "even")
    canvas.text(left + 6, y(routing.budget_kl) - 5, f"budget {formatting.number(routing.budget_kl)}", "label")
    for point in routing.curve:
        low, high = point.loss_interval or (point.loss, point.loss)
        canvas.line(x(point.share), y(low), x(point.share), y(min(high, y.high)), "whisker built-line")
    for field, _, kind in CURVES:
        canvas.path([(x(point.share), y(getattr(point, field))) for point in routing.curve], kind)
    canvas.circle(x(routing.share), y(routing.loss), 6.5, "built", f"threshold: {_where(routing)}")
    return canvas.svg(f"Loss against the share of requests on the build. At the threshold: {_where(routing)}")


def _where(routing: Routing) -> str:
    return f"{routing.share:.0%} of the requests at {formatting.number(routing.loss)} nats per token"
