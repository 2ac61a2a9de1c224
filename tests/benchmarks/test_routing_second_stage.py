"""The benchmark of the second stage: its signals, and a comparison that credits features only with what they add."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.pruning.routing_second_stage import Measured, compare
from benchmarks.pruning.routing_signals import GROUPS, read_signals


def test_signals_are_those_of_the_logits() -> None:
    even, sure = torch.zeros(3, 4), torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [50, 0, 0, 0]])
    signals = read_signals(even, sure, (1, 2, 3))
    assert signals["entropy last"] == pytest.approx(0, abs=1e-6)
    assert signals["entropy all"] == pytest.approx(np.log(4) * 2 / 3)
    assert signals["margin last"] == pytest.approx(50)
    assert signals["surprisal all"] == pytest.approx(np.log(4))
    assert signals["divergence last"] == pytest.approx(np.log(0.75 * 50 - np.log(4)), rel=1e-5)
    assert {key for keys in GROUPS.values() for key in keys} <= signals.keys()


def measured(count: int, seed: int) -> tuple[Measured, np.ndarray, np.ndarray]:
    """Prompts whose log loss is the sum of two independent features and noise, and both features [N, 1]."""
    random = np.random.default_rng(seed)
    first, second = random.standard_normal((2, count, 1))
    loss = np.exp(-2 + 0.5 * (first + second)[:, 0] + 0.3 * random.standard_normal(count))
    return Measured([], np.arange(count), loss, [], [], np.empty((0, 2))), first, second


@pytest.mark.slow
def test_a_feature_is_credited_with_what_it_adds_and_noise_with_nothing() -> None:
    (learned, *learned_features), (served, *served_features) = measured(400, 0), measured(400, 1)
    noise = [np.random.default_rng(seed).standard_normal((400, 1)) for seed in (2, 3)]

    def joined(extra: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        return np.hstack([learned_features[0], extra[0]]), np.hstack([served_features[0], extra[1]])

    sets = {
        "prompt": (learned_features[0], served_features[0]),
        "second": joined([learned_features[1], served_features[1]]),
        "noise": joined(noise),
    }
    result = compare(sets, learned, served)
    rows = result["rows"]
    assert rows["prompt"]["more_than_prompt"] == {"value": 0, "interval": [0, 0]}
    assert rows["second"]["more_than_prompt"]["interval"][0] > 0.05
    assert rows["noise"]["more_than_prompt"]["interval"][0] < 0.01
    assert abs(rows["noise"]["more_than_prompt"]["value"]) < 0.02
    assert rows["second"]["saved"]["value"] < result["oracle"]["value"]
