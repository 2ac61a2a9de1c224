"""The controller keeps the asked quality, holds the budget, and survives bad input."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from calibration.routing import metrics
from calibration.routing.controller import Controller, Decision, Settings, UnavailableError, route_around
from calibration.routing.metrics import Sample
from calibration.routing.router import histograms
from calibration.routing.threshold import AIM, NARROWEST, WIDEST, IntegralControl
from plugins.common.errors import UserError
from tests.support.routing import BUDGET, Policy

MIDDLE_F = np.array([0.5, 0.5])
BOTH = ("dense", "built")
ALL_SHADOWED = Settings(shadow=1.0, window=100_000)  # too few requests for drift


def decide(controller: Controller, predicted: float = 0.01, **asked: Any) -> Decision:
    return controller.decide(MIDDLE_F, predicted, **asked)


@pytest.mark.parametrize(
    ("asked", "predicted", "answers"),
    [
        ({"quality": "high"}, 0.0, "dense"),
        ({"quality": "fast"}, 9.0, "built"),
        ({}, 0.1, "built"),
        ({}, 0.1001, "dense"),
        ({"variant": "built"}, 9.0, "built"),
        ({"variant": "dense", "quality": "fast"}, 0.0, "dense"),
        ({}, float("nan"), "dense"),
        ({}, float("inf"), "dense"),
    ],
)
def test_the_quality_asked_for_chooses(asked: dict[str, Any], predicted: float, answers: str) -> None:
    assert decide(Controller(Policy()), predicted, **asked).variant == answers


@pytest.mark.parametrize("asked", [{"quality": "best"}, {"quality": ""}, {"variant": "tiny"}])
def test_an_unknown_quality_or_variant_is_quoted(asked: dict[str, str]) -> None:
    name, value = next(iter(asked.items()))
    known = "high, auto, fast" if name == "quality" else "dense, built"
    with pytest.raises(UserError, match=f"^'{name}' is '{value}': send one of {known}$"):
        decide(Controller(Policy()), **asked)


@pytest.mark.parametrize(
    ("asked", "up", "full", "answers"),
    [
        ("built", BOTH, (), "built"),
        ("built", ("dense",), (), "dense"),
        ("built", BOTH, ("built",), "dense"),
        ("built", BOTH, BOTH, "built"),  # its own queue decides
        ("built", ("built",), ("built",), "built"),
        ("dense", BOTH, ("dense",), "dense"),  # never poorer while dense is up
        ("dense", ("built",), (), "built"),  # a poorer answer beats none
        ("dense", None, (), "dense"),
    ],
)
def test_a_variant_that_is_down_or_full_is_routed_around(asked: str, up: Any, full: Any, answers: str) -> None:
    assert route_around(asked, BOTH, up, full) == answers


def test_a_third_variant_stands_in_only_for_poorer_ones() -> None:
    variants = ("dense", "built", "tiny")
    assert route_around("tiny", variants, ("dense", "built"), ()) == "built"
    assert route_around("built", variants, ("dense", "tiny"), ()) == "dense"
    assert route_around("built", variants, ("tiny",), ()) == "tiny"


def test_no_variant_up_is_an_error_and_counts_nothing() -> None:
    controller = Controller(Policy())
    with pytest.raises(UnavailableError):
        decide(controller, up=())
    assert not [sample for sample in controller.samples() if sample.name == metrics.REQUESTS]


def test_load_moves_along_the_curve_and_never_beyond_the_budgets_threshold() -> None:
    controller = Controller(Policy(threshold=0.1), Settings(rest=0.5))
    answers = {load: decide(controller, 0.08, load=load).variant for load in (-3.0, 0.0, 0.5, 1.0, 99.0)}
    assert answers == {-3.0: "dense", 0.0: "dense", 0.5: "dense", 1.0: "built", 99.0: "built"}
    assert decide(controller, 0.11, load=99.0).variant == "dense"


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan")])
def test_a_budget_that_only_dense_meets_stays_dense(threshold: float) -> None:
    controller = Controller(Policy(threshold=threshold), Settings(shadow=1.0))
    for _ in range(50):
        decision = decide(controller, 1e-9)
        assert decision.variant == "dense"
        controller.measured(decision, 0.0)


def test_the_threshold_stays_within_its_bounds_and_leaves_them_at_once() -> None:
    control = IntegralControl(BUDGET, float("inf"))
    assert control.threshold == WIDEST * BUDGET
    for _ in range(2000):
        control.measured(0.0)
    assert control.threshold == WIDEST * BUDGET, "no windup"
    control.measured(BUDGET * 10)
    assert control.threshold < WIDEST * BUDGET
    for _ in range(2000):
        control.measured(1e9)
    assert control.threshold == NARROWEST * BUDGET
    control.measured(0.0)
    assert control.threshold > NARROWEST * BUDGET


@pytest.mark.parametrize("factor", [0.1, 1.0, 8.0])
def test_every_shadow_measured_holds_the_budget_whatever_the_predictor_is_worth(factor: float) -> None:
    controller = Controller(Policy(), ALL_SHADOWED)
    random = np.random.default_rng(0)
    paid = []
    for predicted in random.lognormal(np.log(BUDGET), 1.0, 20_000):
        decision = decide(controller, predicted)
        loss = predicted * factor * random.lognormal(-0.125, 0.5)
        assert decision.shadow
        controller.measured(decision, loss)
        paid.append(loss if decision.variant == "built" else 0.0)
    settled = np.mean(paid[len(paid) // 4 :])
    cheapest = AIM * BUDGET if factor > 0.5 else 0.0  # a harmless cheap engine answers all and leaves budget over
    assert cheapest * 0.95 <= settled <= BUDGET


def test_no_shadow_is_asked_for_what_the_threshold_did_not_decide() -> None:
    controller = Controller(Policy(), Settings(shadow=1.0))
    for asked in ({"quality": "high"}, {"quality": "fast"}, {"variant": "built"}):
        assert not decide(controller, **asked).shadow
    assert not decide(Controller(Policy(), Settings(shadow=0.0))).shadow


def test_a_loss_beyond_the_threshold_counts_as_none() -> None:
    controller = Controller(Policy())
    before = controller.samples()[Sample(metrics.THRESHOLD)]
    controller.measured(decide(controller, 5.0), 1e6)
    assert controller.samples()[Sample(metrics.THRESHOLD)] > before
    assert controller.samples()[Sample(metrics.RECENT_LOSS)] == 0


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -1.0])
def test_a_loss_that_is_none_moves_nothing(loss: float) -> None:
    controller = Controller(Policy())
    before = controller.state()
    controller.measured(decide(controller), loss)
    assert controller.state() == before
    assert controller.samples()[Sample(metrics.SHADOWS_DISCARDED)] == 1


def test_drift_sends_requests_to_dense_until_it_recedes() -> None:
    controller = Controller(Policy(), Settings(window=200, shadow=1.0))
    random = np.random.default_rng(0)

    def answers(count: int, low: float) -> list[str]:
        return [controller.decide(random.uniform(low, 1, 2), 0.01).variant for _ in range(count)]

    assert set(answers(1000, 0.0)) == {"built"}
    state = controller.state()
    answers(200, 0.7)
    assert set(answers(300, 0.7)) == {"dense"}
    assert controller.samples()[Sample(metrics.DRIFT_ALARM)] == 1
    decision = controller.decide(np.array([0.9, 0.9]), 0.01)
    assert not decision.shadow
    controller.measured(decision, 1.0)
    assert controller.state() == state, "the threshold decides nothing now"
    answers(400, 0.0)
    assert set(answers(300, 0.0)) == {"built"}


@pytest.mark.parametrize("prompts", [22, 90, 700])
def test_few_training_prompts_raise_no_false_alarm(prompts: int) -> None:
    random = np.random.default_rng(prompts)
    edges, reference_FB = histograms(random.standard_normal((prompts, 14)))
    controller = Controller(Policy(edges=edges, reference_FB=reference_FB, prompts=prompts))
    for _ in range(3000):
        controller.decide(random.standard_normal(14), 0.01)
        assert not controller.alarm
    for _ in range(1000):
        controller.decide(random.standard_normal(14) + 3, 0.01)
    assert controller.alarm


def test_features_that_are_not_finite_go_to_dense_and_leave_drift_alone() -> None:
    controller = Controller(Policy(), Settings(window=100))
    for _ in range(500):
        assert controller.decide(np.array([np.nan, np.inf]), float("inf")).variant == "dense"
    assert controller.samples()[Sample(metrics.DRIFT)] == 0
    assert controller.samples()[Sample(metrics.UNPREDICTED)] == 500
    assert not controller.alarm


def test_threads_lose_no_request() -> None:
    controller = Controller(Policy(), ALL_SHADOWED)

    def work(_: int) -> None:
        for _ in range(500):
            controller.measured(decide(controller), BUDGET)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    samples = controller.samples()
    assert sum(value for sample, value in samples.items() if sample.name == metrics.REQUESTS) == 4000
    assert samples[Sample(metrics.MEASURED)] == 4000
