"""Renders the marked blocks of docs/routing.md: metrics, and the simulation's newest result."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from make_readme import RESULTS, ROOT, fill
from result_files import newest

from calibration.routing.metrics import METRICS

PAGE = Path(__file__).parent / "routing.md"
LAWS = """
| losses | law | mean loss before, after | worst {block} requests | share of cheap requests | oracle's share |
|---|---|---|---|---|---|
{rows}
"""
SERVICE = """
The controller on {requests:,} requests whose losses double half-way ([values]({path})):

| threshold at rest | mean loss before, after | share of cheap requests | oracle's share | idle, at peaks |
|---|---|---|---|---|
{rows}
With features that move by {shift} standard deviations for a quarter of the requests: {false_alarms} false alarms
before, the alarm after {requests_to_alarm} requests, its end {requests_to_recede} requests after the features came
back, and {cheap_during_alarm} cheap requests between.
"""
FOOT = """
Losses are in budgets: 1 is the budget of {budget} nats a token. One request in a hundred is measured. A decision took
{us:.0f} us on one core of an {processor} that did other work too.
"""


def page() -> str:
    return fill(PAGE, BLOCKS)


def simulation() -> str:
    result, path = next(iter(newest(RESULTS, "routing-simulation", lambda result: "the controller").values()))
    rows = [_law(case, name, law) for case, laws in result["laws"].items() for name, law in laws.items()]
    service = [_service(name, run) for name, run in result["controller"].items()]
    scenarios = result["scenarios"]
    return (
        LAWS.format(block="50,000", rows="".join(rows).rstrip("\n"))
        + SERVICE.format(
            requests=scenarios["losses double"]["requests"],
            path=f"../{path.relative_to(ROOT).as_posix()}",
            rows="".join(service),
            shift=scenarios["features drift"]["shift"],
            **result["features drift"],
        )
        + FOOT.format(
            budget=result["budget"],
            us=max(run["decision_us"] for run in result["controller"].values()),
            processor=result["environment"]["processor"],
        )
    ).lstrip("\n")


def metrics() -> str:
    rows = [f"| `{name}` | {kind} | {help_text} |\n" for name, (kind, help_text) in METRICS.items()]
    return f"| metric | kind | |\n|---|---|---|\n{''.join(rows)}"


BLOCKS: dict[str, Callable[[], str]] = {"metrics": metrics, "simulation": simulation}


def _law(case: str, name: str, law: dict[str, Any]) -> str:
    worst = max(half["worst_block_over_budget"] for half in law.values())
    return f"| {case} | {name} | {_pair(law, 'loss_over_budget')} | {worst:.2f} | {_shares(law)} |\n"


def _service(name: str, run: dict[str, Any]) -> str:
    rest = float(name.removeprefix("rest "))
    peaks = f"{run['cheap_share_idle']:.0%}, {run['cheap_share_peak']:.0%}"
    return f"| {rest:.0%} | {_pair(run, 'loss_over_budget')} | {_shares(run)} | {peaks} |\n"


def _pair(halves: dict[str, Any], key: str) -> str:
    return f"{halves['before'][key]:.2f}, {halves['after'][key]:.2f}"


def _shares(halves: dict[str, Any]) -> str:
    shares = [", ".join(f"{halves[half][key]:.0%}" for half in ("before", "after")) for key in _SHARES]
    return " | ".join(shares)


_SHARES = ("cheap_share", "oracle_share")
