"""The loss of exact match: its interval, the questions that show it, and its prediction from margins."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.evaluation.answer_loss import (
    Answers,
    Z,
    compare_answers,
    exact_match_change,
    loss_interval,
    questions_needed,
)


def test_the_interval_turns_with_the_sides() -> None:
    low, high = loss_interval(12, 3, 200)
    assert loss_interval(3, 12, 200) == pytest.approx((-high, -low))
    assert low < 9 / 200 < high


@pytest.mark.parametrize(("lost", "gained"), [(12, 3), (11, 4), (8, 1), (4, 1)])
def test_the_interval_excludes_no_loss_where_mcnemars_test_does(lost: int, gained: int) -> None:
    significant = (lost - gained) ** 2 / (lost + gained) > Z * Z
    assert (loss_interval(lost, gained, 200)[0] > 0) == significant


def test_answers_that_all_stay_or_all_change() -> None:
    assert loss_interval(0, 0, 100) == pytest.approx((-Z * Z / (100 + Z * Z), Z * Z / (100 + Z * Z)))
    assert loss_interval(5, 0, 5)[1] == 1
    assert loss_interval(0, 5, 5)[0] == -1
    assert loss_interval(50, 50, 100) == pytest.approx((-0.19, 0.19), abs=0.01)


def test_the_interval_holds_the_true_loss_in_95_of_100_samples() -> None:
    random = np.random.default_rng(0)
    held = 0
    for lost, gained, _ in random.multinomial(400, [0.06, 0.02, 0.92], size=1000):
        low, high = loss_interval(int(lost), int(gained), 400)
        held += low <= 0.04 <= high
    assert 0.935 < held / 1000 < 0.965


@pytest.mark.parametrize("limit", [0.005, 0.01, 0.05, 0.4])
def test_the_questions_needed_are_the_fewest_that_show_the_limit(limit: float) -> None:
    needed = questions_needed(limit)
    assert loss_interval(0, 0, needed)[1] <= limit < loss_interval(0, 0, needed - 1)[1]


def test_two_models_are_compared_question_by_question() -> None:
    compared = compare_answers([True, True, False, True], [True, False, True, False])
    assert compared["exact_match"] == {"questions": 4, "dense": 0.75, "built": 0.5}
    assert compared["exact_match_loss"] == 0.25
    assert compared["exact_match_loss_interval"] == list(loss_interval(2, 1, 4))
    assert exact_match_change(compared).startswith("exact match -25.00% (-")


def test_the_predicted_loss_is_that_of_noise_on_the_logits() -> None:
    """Independent noise of deviation s: KL is about s**2 / 2, and a token changes where its margin goes."""
    random = np.random.default_rng(0)
    margins = random.exponential(1.0, size=(300, 4))
    answers = Answers([True] * 300 + [False] * 100, margins.tolist())
    for deviation in (0.05, 0.2):
        noise = random.normal(0, deviation, size=(200, *margins.shape, 2))
        changed = (margins + noise[..., 0] - noise[..., 1] < 0).any(axis=-1).mean() * 300 / 400
        assert answers.predicted_loss(deviation**2 / 2) == pytest.approx(changed, rel=0.05)


def test_the_kl_of_a_loss_turns_the_prediction_around() -> None:
    answers = Answers([True] * 50, [[margin / 20] for margin in range(50)])
    assert answers.predicted_loss(0) == 0
    for loss in (0.01, 0.1, 0.3):
        assert answers.predicted_loss(answers.kl_of(loss)) == pytest.approx(loss, rel=1e-6)
    assert answers.kl_of(0.9) == pytest.approx(1e3), "more than noise can change"
