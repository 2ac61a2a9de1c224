"""The controller in simulation: it holds the budget through a change, and keeps most of what an oracle could give."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.pruning.routing import BUDGET, Scenario, oracle_share, run_controller, run_law, simulate, summary
from benchmarks.pruning.routing_laws import LAWS


def test_the_controller_holds_the_budget_through_a_change() -> None:
    requests = simulate(Scenario(40_000))
    before, after = summary(requests, run_controller(requests, shadow=0.2)[0]).values()
    for half in (before, after):
        assert 0.8 < half["loss_over_budget"] <= 1.02
        assert half["random_share"] < half["cheap_share"] < half["oracle_share"]
    assert after["cheap_share"] < before["cheap_share"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(LAWS))
def test_a_fixed_threshold_fails_where_laws_adapt(name: str) -> None:
    requests = simulate(Scenario(100_000))
    after = summary(requests, run_law(LAWS[name], requests, shadow=0.2))["after"]
    assert (after["loss_over_budget"] > 1.9) == (name == "fixed")


def test_the_oracle_spends_the_budget_on_the_smallest_losses() -> None:
    assert oracle_share(np.array([0.0, 2 * BUDGET, 0.0, 3 * BUDGET])) == 0.75
    assert oracle_share(np.array([9.0, 9.0])) == 0
