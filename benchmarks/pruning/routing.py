"""A router's controller in simulation: loss against its budget, and the cheap engine's share against an oracle's.

    python -m benchmarks.pruning.routing

Simulated requests have features, a predicted loss, and a true loss that the prediction misses by a log-normal factor.
Half-way, every loss grows while its prediction stays; load comes in peaks. First each law for the threshold runs alone
(`routing_laws.py`), then the controller itself, once more with features that drift far away for a while. Writes
`benchmarks/results/routing-simulation-DATE.json`. No engine runs: the figures hold for this model of requests.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import describe
from benchmarks.pruning.accuracy import RESULTS, write_result
from benchmarks.pruning.routing_laws import LAWS, Law
from calibration.routing.controller import Controller, Settings

Array = np.ndarray[Any, Any]
BUDGET = 0.05  # nats per token
BLOCK = 50_000  # requests whose mean loss is compared with the budget
FEATURES = 4
BINS = 10


@dataclass(frozen=True)
class Scenario:
    """growth: factor on the losses after half the requests
    outliers: share of requests whose loss is 10 times as high, whatever was predicted
    shift: of the features in their standard deviations, in the third quarter of the requests
    """

    requests: int = 1_000_000
    growth: float = 2.0
    outliers: float = 0.0
    shift: float = 0.0
    spread: float = 0.7  # of the log of true over predicted loss
    seed: int = 0


@dataclass(frozen=True)
class Requests:
    """features [N, F] float32; of each request [N] the predicted and the true loss in nats per token, and the load."""

    features: Array
    predicted: Array
    loss: Array
    load: Array


@dataclass
class Policy:
    """A router's facts, as `Controller` reads them."""

    threshold: float
    reference_FB: Array
    edges: Array
    build_id: str = "simulation"
    variants: tuple[str, ...] = ("dense", "built")
    budget_kl: float = BUDGET
    prompts: int = 100_000


def simulate(scenario: Scenario) -> Requests:
    """Draws the requests."""
    random = np.random.default_rng(scenario.seed)
    count = scenario.requests
    place_N = np.arange(count) / count
    features_NF = random.standard_normal((count, FEATURES), dtype=np.float32)
    features_NF[(place_N >= 0.5) & (place_N < 0.75)] += scenario.shift
    log_N = np.log(BUDGET) + features_NF @ np.full(FEATURES, 0.4, np.float32) + 0.5
    noise_N = random.normal(-(scenario.spread**2) / 2, scenario.spread, count)
    factor_N = np.where(random.random(count) < scenario.outliers, 10.0, 1.0)
    growth_N = np.where(place_N >= 0.5, scenario.growth, 1.0)
    load_N = np.clip(np.sin(place_N * 200 * np.pi), 0, 1)  # a hundred peaks
    return Requests(features_NF, np.exp(log_N), np.exp(log_N + noise_N) * factor_N * growth_N, load_N)


def learned_threshold(requests: Requests, budget: float = BUDGET) -> float:
    """The threshold that holds the budget on the first tenth: what learning gives."""
    part = slice(0, len(requests.loss) // 10)
    order = np.argsort(requests.predicted[part])
    within = np.cumsum(requests.loss[part][order]) <= budget * len(order)
    return float(requests.predicted[part][order][within.sum() - 1])


def run_law(make: Callable[[float, float], Law], requests: Requests, shadow: float = 0.01) -> Array:
    """Which requests are cheap [N] bool. The threshold is constant between two shadow runs."""
    law = make(BUDGET, learned_threshold(requests))
    cheap_N = np.zeros(len(requests.loss), bool)
    shadows = np.flatnonzero(np.random.default_rng(1).random(len(cheap_N)) < shadow)
    for start, end in zip([0, *(shadows + 1)], [*(shadows + 1), len(cheap_N)], strict=True):
        cheap_N[start:end] = requests.predicted[start:end] <= law.threshold
        if end and end <= shadows[-1] + 1:
            last = end - 1
            law.measured(float(requests.predicted[last]), float(requests.loss[last]) if cheap_N[last] else None)
    return cheap_N


def run_controller(requests: Requests, shadow: float = 0.01, rest: float = 1.0) -> tuple[Array, Array, float]:
    """Which requests are cheap [N] bool, when the alarm was on [N] bool, and the mean time of a decision in s."""
    part = requests.features[: len(requests.features) // 10]
    edges = np.quantile(part, np.arange(1, BINS) / BINS, axis=0).T
    reference_FB = np.full((FEATURES, BINS), 1 / BINS)
    controller = Controller(
        Policy(learned_threshold(requests), reference_FB, edges), Settings(shadow=shadow, rest=rest), seed=0
    )
    predicted, loss, load = requests.predicted.tolist(), requests.loss.tolist(), requests.load.tolist()
    cheap_N, alarm_N = np.zeros(len(loss), bool), np.zeros(len(loss), bool)
    seconds = 0.0
    for index, features_F in enumerate(requests.features):
        start = time.perf_counter()
        decision = controller.decide(features_F, predicted[index], load=load[index])
        seconds += time.perf_counter() - start
        cheap_N[index], alarm_N[index] = decision.variant == "built", controller.alarm
        if decision.shadow:
            controller.measured(decision, loss[index])
    return cheap_N, alarm_N, seconds / len(loss)


def oracle_share(loss_N: Array) -> float:
    """The cheap share of an oracle: it sends the requests with the smallest losses within the budget."""
    return float((np.cumsum(np.sort(loss_N)) <= BUDGET * len(loss_N)).mean())


def summary(requests: Requests, cheap_N: Array) -> dict[str, Any]:
    """Before and after half the requests: mean loss and the worst block's in budgets, cheap share, the oracle's."""
    paid_N = np.where(cheap_N, requests.loss, 0.0) / BUDGET
    half = len(paid_N) // 2
    halves = {"before": slice(0, half), "after": slice(half, None)}
    return {
        name: {
            "loss_over_budget": float(paid_N[part].mean()),
            "worst_block_over_budget": float(paid_N[part].reshape(-1, min(BLOCK, half)).mean(axis=1).max()),
            "cheap_share": float(cheap_N[part].mean()),
            "oracle_share": oracle_share(requests.loss[part]),
            "random_share": min(1.0, BUDGET / float(requests.loss[part].mean())),
        }
        for name, part in halves.items()
    }


def run(count: int) -> dict[str, Any]:
    """All simulations with `count` requests each."""
    cases = {
        "losses double": Scenario(count),
        "losses double, 10% outliers": Scenario(count, outliers=0.1),
    }
    far = Scenario(count, growth=1.0, shift=1.5)
    drawn = {name: simulate(case) for name, case in cases.items()}
    laws = {
        case: {name: summary(requests, run_law(make, requests)) for name, make in LAWS.items()}
        for case, requests in drawn.items()
    }
    service = drawn["losses double"]
    drifting = simulate(far)
    far_cheap_N, alarm_N, _ = run_controller(drifting)
    return {
        "environment": describe(("twofour", "numpy")),
        "budget": BUDGET,
        "scenarios": {name: asdict(case) for name, case in {**cases, "features drift": far}.items()},
        "laws": laws,
        "controller": {f"rest {rest}": _service(service, rest) for rest in (1.0, 0.5)},
        "features drift": _drift(alarm_N, far_cheap_N),
    }


def _service(requests: Requests, rest: float) -> dict[str, Any]:
    cheap_N, _, seconds = run_controller(requests, rest=rest)
    shares = {
        "cheap_share_idle": float(cheap_N[requests.load == 0].mean()),
        "cheap_share_peak": float(cheap_N[requests.load > 0.9].mean()),
    }
    return {**summary(requests, cheap_N), **shares, "decision_us": seconds * 1e6}


def _drift(alarm_N: Array, cheap_N: Array) -> dict[str, Any]:
    """The alarm's delays to start and end, in requests, and the cheap share in between."""
    count = len(alarm_N)
    begin, end = count // 2, count * 3 // 4
    raised = begin + int(alarm_N[begin:].argmax())
    ended = end + int((~alarm_N[end:]).argmax())
    return {
        "false_alarms": int(alarm_N[:begin].sum()),
        "requests_to_alarm": raised - begin,
        "requests_to_recede": ended - end,
        "cheap_during_alarm": int(cheap_N[alarm_N].sum()),
        "cheap_share_before": float(cheap_N[:begin].mean()),
        "cheap_share_afterwards": float(cheap_N[ended:].mean()),
    }


def main() -> None:
    """Runs, writes the result and prints it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning.routing", description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the result file")
    chosen = parser.parse_args()
    print(write_result("routing-simulation", run(chosen.requests), chosen.out))


if __name__ == "__main__":
    main()
