"""Renders the marked blocks of docs/routing.md: metrics, and the newest results.

Those are of the second stage, of a server and of the simulation.
"""

from collections.abc import Callable
from typing import Any

from make_readme import fill
from result_files import ROOT, newest

from calibration.routing.metrics import METRICS

PAGE = ROOT / "docs" / "routing.md"
LAWS = """
| losses | law | mean loss before, after | worst 50,000 requests | share of cheap requests | oracle's share |
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
SERVER = """
On {prompts} held-out prompts, {kinds}, between `{model}` and
its 2:4 build, {max_tokens} tokens per answer ([values]({path})). Both engines measured the loss of each prompt:

| | measured | 95% interval |
|---|---|---|
{rows}
Then {requests:,} requests at {rate:g} per second; {first:.0%} of the first half and {second:.0%} of the second are
documentation. Shadow runs measure {shadow:.0%}. A dense answer has no loss, the build's has its prompt's:

| | first half | second half | all |
|---|---|---|---|
{spent}
Of these {requests:,}, {lost} got no answer, {wrong} the answer of another request, and {other} differed by rounding
(two tokens at most {widest_tie:.3f} nats apart). {measured_total:.0f} shadow runs were measured. {alarm}
The median answer took {median:.0f} ms on the {cores} cores of an {processor}.
"""
SECOND_STAGE = """
| features, besides the prompt's | {models} |
|---|{rules}|
{rows}
The share of a random mix's loss that the router saves, over all shares of requests on the build, and in parentheses how
much more that is than with the prompt alone. Models and their 2:4 builds, values, and the time of a prefill and of an
answer of {max_tokens} tokens on one of the {cores} cores of an {processor} that did other work too: {values}.
"""
ESTIMATES = {
    "share": "share of requests on the build",
    "router_loss": "mean loss with the router, nats per token",
    "random_loss": "mean loss of a random mix of that share",
    "gain": "reduction by the router",
}
SPENT = (  # title, form, part of the result, its key
    ("mean loss, in budgets of {budget:g} nats per token", "{:.2f}", "spent", "loss_over_budget"),
    ("share of requests on the build", "{:.0%}", "spent", "cheap_share"),
    ("computed: mean loss with the initial threshold", "{:.2f}", "learned_threshold_alone", "loss_over_budget"),
)
FOOT = """
Losses are in budgets: 1 is the budget of {budget} nats per token. One request in a hundred is measured. A decision took
{us:.0f} us on one core of an {processor} that did other work too.
"""


def page() -> str:
    return fill(PAGE, BLOCKS)


def simulation() -> str:
    result, path = next(iter(newest("routing-simulation", lambda result: "the controller").values()))
    rows = [_law(case, name, law) for case, laws in result["laws"].items() for name, law in laws.items()]
    service = [_service(name, run) for name, run in result["controller"].items()]
    scenarios = result["scenarios"]
    return (
        LAWS.format(rows="".join(rows).rstrip("\n"))
        + SERVICE.format(
            requests=scenarios["losses double"]["requests"],
            path=f"../{path}",
            rows="".join(service),
            shift=scenarios["features drift"]["shift"],
            **result["features drift"],
        )
        + FOOT.format(
            **result["environment"],
            budget=result["budget"],
            us=max(run["decision_us"] for run in result["controller"].values()),
        )
    ).lstrip("\n")


def server() -> str:
    result, path = next(iter(newest("routing-serving", lambda result: "Triton").values()))
    settings, once, mixed = (result[name] for name in ("settings", "once", "changing mix"))
    checks = mixed["checks"]
    return SERVER.format(
        **(mixed["router"] | checks | settings | result["environment"]),
        kinds=" and ".join(f"{name} (all on the build: {loss:.3f})" for name, loss in result["mean_loss"].items()),
        path=f"../{path}",
        rows="".join(_estimate(name, once["equal_share"][name]) for name in ESTIMATES),
        first=settings["docs_share"],
        second=1 - settings["docs_share"],
        spent="".join(_spent(mixed, settings["budget_kl"], *row) for row in SPENT),
        wrong=checks["wrong_input_tokens"] + checks["crossed"],
        other=checks["other_tokens"],
        alarm=_alarm(mixed["course"]),
        median=mixed["seconds"]["median"] * 1000,
    ).lstrip("\n")


def second_stage() -> str:
    results = dict(sorted(newest("routing-second-stage", _model).items()))
    first = next(result for result, _ in results.values())
    rows = {
        name: [_saved(result["rows"][name], name == "prompt") for result, _ in results.values()]
        for name in first["rows"]
    }
    rows["oracle"] = [f"{result['oracle']['value']:.1%}" for result, _ in results.values()]
    named = {"none" if name == "prompt" else name: cells for name, cells in rows.items()}
    return SECOND_STAGE.format(
        models=" | ".join(results),
        rules="|".join("---" for _ in results),
        rows="".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in named.items()),
        **first["settings"],
        **first["environment"],
        values="; ".join(_second_stage(model, *found) for model, found in results.items()),
    ).lstrip("\n")


def _model(result: dict[str, Any]) -> str:
    return str(result["settings"]["model"])


def _saved(row: dict[str, Any], alone: bool) -> str:
    """What a set of features saves, and how much more than the first."""
    more = row["more_than_prompt"]
    low, high = (f"{100 * bound:+.1f}" for bound in more["interval"])
    return f"{row['saved']['value']:.1%}" + ("" if alone else f" ({100 * more['value']:+.1f} points, {low} to {high})")


def _second_stage(model: str, result: dict[str, Any], path: str) -> str:
    settings, times = result["settings"], result["milliseconds"]
    return (
        f"[{model}](../{path}), {settings['learned']} prompts, tested on "
        f"{settings['served']} of {settings['documents']} other documents, {times['prefill']:.1f} and "
        f"{times['answer']:.0f} ms"
    )


def metrics() -> str:
    rows = [f"| `{name}` | {kind} | {help_text} |\n" for name, (kind, help_text) in METRICS.items()]
    return f"| metric | kind | |\n|---|---|---|\n{''.join(rows)}"


BLOCKS: dict[str, Callable[[], str]] = {
    "second stage": second_stage,
    "metrics": metrics,
    "server": server,
    "simulation": simulation,
}


def _estimate(name: str, estimate: dict[str, Any]) -> str:
    low, high = estimate["interval"]
    form = "{:.3f}" if name.endswith("loss") else "{:.1%}"
    return f"| {ESTIMATES[name]} | {form.format(estimate['value'])} | {form.format(low)} to {form.format(high)} |\n"


def _spent(mixed: dict[str, Any], budget: float, title: str, form: str, part: str, key: str) -> str:
    values = " | ".join(form.format(mixed[part][when][key]) for when in ("first half", "second half", "all"))
    return f"| {title.format(budget=budget)} | {values} |\n"


def _alarm(course: list[dict[str, float]]) -> str:
    """The drift index and alarm over the requests, from regular reads of the metrics."""
    highest = max(look["drift"] for look in course)
    first = next((look["request"] for look in course if look["drift_alarm"]), None)
    alarm = "no alarm" if first is None else f"the alarm started by request {first:.0f}, all dense after it"
    return f"The highest drift index was {highest:.2f}; {alarm}."


def _law(case: str, name: str, law: dict[str, Any]) -> str:
    worst = max(half["worst_block_over_budget"] for half in law.values())
    return f"| {case} | {name} | {_pair(law, 'loss_over_budget')} | {worst:.2f} | {_shares(law)} |\n"


def _service(name: str, run: dict[str, Any]) -> str:
    rest = float(name.removeprefix("rest "))
    peaks = f"{run['cheap_share_idle']:.0%}, {run['cheap_share_peak']:.0%}"
    return f"| {rest:.0%} | {_pair(run, 'loss_over_budget')} | {_shares(run)} | {peaks} |\n"


def _pair(halves: dict[str, Any], key: str, form: str = ".2f") -> str:
    return f"{halves['before'][key]:{form}}, {halves['after'][key]:{form}}"


def _shares(halves: dict[str, Any]) -> str:
    return " | ".join(_pair(halves, key, ".0%") for key in ("cheap_share", "oracle_share"))
