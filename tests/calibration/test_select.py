"""The choice of layers under a budget: as good as trying everything, honest about what it measured."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.budget.search import Option, select, select_layers
from plugins.common.errors import GateError, UserError


def subsets(names):
    return itertools.chain.from_iterable(itertools.combinations(names, count) for count in range(1, len(names) + 1))


def best_of_all(gain, budget, measure):
    return max((sum(gain[name] for name in s) for s in subsets(gain) if measure(list(s)) <= budget), default=None)


def superadditive(cost, strength):
    """A perplexity increase that grows faster than the sum of the layers' costs."""

    def measure(layers):
        total = sum(cost[layer] for layer in layers)
        return math.expm1(total * (1 + strength * total))

    return measure


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.floats(0.1, 0.9), st.floats(0, 3))
def test_proven_selection_is_the_best_of_all(seed, share, strength):
    rng = np.random.default_rng(seed)
    names = [f"layer{at}" for at in range(5)]
    true = dict(zip(names, rng.uniform(0.01, 0.1, 5), strict=True))
    believed = {name: value * rng.uniform(0.5, 2) for name, value in true.items()}
    gain = dict(zip(names, rng.integers(1, 5, 5).astype(float), strict=True))
    measure = superadditive(true, strength)
    budget = share * measure(names)
    best = best_of_all(gain, budget, measure)
    if best is None:
        with pytest.raises(GateError):
            select_layers(believed, gain, budget, measure, tries=100, margin=math.inf, worth=0)
        return
    found = select_layers(believed, gain, budget, measure, tries=100, margin=math.inf, worth=0)
    assert found.proven
    assert found.seconds_saved == pytest.approx(best)
    assert found.measured_increase == measure(found.layers) <= budget


def test_few_measurements_come_close_on_many_layers():
    rng = np.random.default_rng(0)
    names = [f"layer{at}" for at in range(80)]
    true = dict(zip(names, rng.lognormal(-6, 1, 80), strict=True))
    believed = {name: value * rng.lognormal(0, 0.3) for name, value in true.items()}
    gain = dict.fromkeys(names, 1e-5)
    measured = []

    def measure(layers):
        measured.append(layers)
        return superadditive(true, 0.5)(layers)

    found = select_layers(believed, gain, 0.10, measure)
    assert len(measured) <= 12
    assert found.measured_increase <= 0.10
    cheapest, most = sorted(true, key=true.get), 0  # with equal gains the best selection takes the cheapest layers
    while superadditive(true, 0.5)(cheapest[: most + 1]) <= 0.10:
        most += 1
    assert len(found.layers) >= 0.97 * most


def test_all_layers_where_all_fit():
    found = select_layers({"a": 0.01, "b": 0.02}, {"a": 1.0, "b": 1.0}, 0.1, lambda layers: 0.01 * len(layers), worth=0)
    assert found.layers == ["a", "b"]
    assert found.proven


def test_wrong_costs_are_put_right_by_measuring():
    gain = {"a": 1.0, "b": 1.0, "c": 1.0}
    true = {"a": 0.04, "b": 0.001, "c": 0.002}
    found = select_layers({"a": 0.001, "b": 0.04, "c": 0.04}, gain, 0.01, superadditive(true, 0.0))
    assert found.layers == ["b", "c"]


def test_a_budget_that_nothing_meets_names_the_smallest_loss():
    true = {"a": 0.05, "b": 0.03, "c": 0.04}
    with pytest.raises(GateError, match=r"0\.100%: the smallest increase reached is 3\.045%, with b pruned"):
        select_layers(dict.fromkeys(true, 0.01), dict.fromkeys(true, 1.0), 0.001, superadditive(true, 0.0))


def test_one_option_a_layer_and_the_better_one():
    options = [
        Option("a", "fp8", 0.01, 1.0), Option("a", "2:4+fp8", 0.03, 2.0),
        Option("b", "fp8", 0.01, 1.0), Option("b", "2:4+fp8", 0.09, 2.0),
        Option("c", "2:4", 0.01, 0.0),
    ]  # fmt: skip
    cost = {(option.layer, option.choice): option.cost for option in options}
    found = select(options, 0.05, lambda choices: math.expm1(sum(cost[item] for item in choices.items())))
    assert found.choices == {"a": "2:4+fp8", "b": "fp8"}  # c would save nothing


def test_the_front_keeps_measured_and_predicted_apart():
    cost = {"a": 0.01, "b": 0.02, "c": 0.04}
    measured = []

    def measure(layers):
        measured.append(sorted(layers))
        return superadditive(cost, 1.0)(layers)

    found = select_layers(cost, dict.fromkeys(cost, 1.0), 0.035, measure, {"a": 10, "b": 20, "c": 40})
    assert [point["chosen"] for point in found.pareto].count(True) == 1
    for point in found.pareto:
        assert point["measured"] == (sorted(point["layers"]) in measured) or not point["measured"]
        assert point["bytes"] == sum({"a": 10, "b": 20, "c": 40}[layer] for layer in point["layers"])
    for kind in (True, False):
        front = [point for point in found.pareto if point["measured"] is kind]
        assert front
        assert all(
            p["increase"] < q["increase"] and p["seconds_saved"] < q["seconds_saved"]
            for p, q in itertools.pairwise(front)
        )


def test_bad_input_is_named():
    with pytest.raises(UserError, match=r"cost or a gain alone: \['b'\]"):
        select_layers({"a": 0.1}, {"a": 1.0, "b": 1.0}, 0.1, lambda _: 0.0)
    with pytest.raises(UserError, match="nothing to select"):
        select_layers({"a": 0.1}, {"a": 0.0}, 0.1, lambda _: 0.0)
