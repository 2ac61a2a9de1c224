"""Statistics: nearest-rank percentiles, resampling by rounds, and intervals with their nominal coverage."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving import stats

RUNS = 300
SPREAD_OF_COVERAGE = 0.04  # three standard errors of a share of 0.95 over 300 runs


def simulate(random: np.random.Generator, rounds: int, requests: int, shift: float) -> tuple[np.ndarray, np.ndarray]:
    """Latencies of two sides: lognormal, with a mood of each round that both share and one that they do not."""
    mood = random.normal(0, 0.1, rounds)

    def side(mean: float) -> np.ndarray:
        of_round = mean + mood + random.normal(0, 0.05, rounds)
        return np.exp(np.repeat(of_round, requests) + random.normal(0, 0.2, rounds * requests))

    return side(0.0), side(shift)


@pytest.mark.parametrize("rounds", [3, 5, 10])
@pytest.mark.parametrize("kind", ["mean", "median"])
def test_the_paired_ratio_lies_in_its_95_percent_interval_95_percent_of_the_time(rounds: int, kind: str) -> None:
    random = np.random.default_rng(7)
    cluster = np.repeat(np.arange(rounds), 8)
    held = 0
    for run in range(RUNS):
        dense, built = simulate(random, rounds, 8, shift=-0.2)
        above, below = (
            stats.mean(values, cluster) if kind == "mean" else stats.percentile(values, cluster, 50)
            for values in (dense, built)
        )
        interval = stats.estimate(stats.ratio(above, below), rounds, resamples=400, seed=run).interval
        assert interval is not None
        held += interval[0] <= np.exp(0.2) <= interval[1]
    assert held / RUNS >= 0.95 - SPREAD_OF_COVERAGE


@pytest.mark.slow
def test_resampling_single_requests_would_have_claimed_too_much() -> None:
    """Why rounds are resampled: treating requests as independent makes a 95% interval hold far less often."""
    random = np.random.default_rng(7)
    rounds, requests = 6, 16
    held = {"rounds": 0, "requests": 0}
    clusters = {"rounds": np.repeat(np.arange(rounds), requests), "requests": np.arange(rounds * requests)}
    for run in range(RUNS):
        dense, _ = simulate(random, rounds, requests, 0.0)
        for name, cluster in clusters.items():
            statistic = stats.percentile(dense, cluster, 50)
            interval = stats.estimate(statistic, int(cluster.max()) + 1, resamples=300, seed=run).interval
            assert interval is not None
            held[name] += interval[0] <= 1.0 <= interval[1]
    assert held["rounds"] / RUNS >= 0.95 - SPREAD_OF_COVERAGE
    assert held["requests"] / RUNS < 0.85


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95])
def test_a_mean_is_covered_as_often_as_asked(confidence: float) -> None:
    random = np.random.default_rng(3)
    cluster = np.arange(12)
    held = 0
    for run in range(RUNS):
        values = random.gamma(9.0, 1 / 9.0, size=12)
        interval = stats.estimate(
            stats.mean(values, cluster), 12, confidence=confidence, resamples=400, seed=run
        ).interval
        assert interval is not None
        held += interval[0] <= 1.0 <= interval[1]
    assert held / RUNS == pytest.approx(confidence, abs=0.09)


def test_paired_rounds_give_a_narrower_interval_than_unpaired_ones() -> None:
    random = np.random.default_rng(5)
    cluster = np.repeat(np.arange(8), 8)
    mood = np.repeat(random.normal(0, 0.3, 8), 8)  # much stronger than the difference
    dense, built = (np.exp(mood + random.normal(shift, 0.02, 64)) for shift in (0.1, 0.0))
    paired = stats.estimate(stats.ratio(stats.mean(dense, cluster), stats.mean(built, cluster)), 8).interval
    shuffled = np.concatenate([built.reshape(8, 8)[[3, 0, 6, 1, 7, 2, 4, 5]]]).ravel()
    unpaired = stats.estimate(stats.ratio(stats.mean(dense, cluster), stats.mean(shuffled, cluster)), 8).interval
    assert paired is not None
    assert unpaired is not None
    assert paired[0] > 1
    assert np.log(unpaired[1] / unpaired[0]) > 10 * np.log(paired[1] / paired[0])


positive = st.floats(0.01, 1e4)
rounds_of_values = st.integers(2, 6).flatmap(
    lambda rounds: st.lists(st.lists(positive, min_size=1, max_size=5), min_size=rounds, max_size=rounds)
)


def flat(rounds: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([np.array(values) for values in rounds]), np.repeat(
        np.arange(len(rounds)), [len(values) for values in rounds]
    )


@given(rounds_of_values)
def test_swapping_the_sides_inverts_the_ratio_and_its_interval(rounds: list[list[float]]) -> None:
    values, cluster = flat(rounds)
    one, other = stats.mean(values, cluster), stats.mean(values[::-1] + 1.0, cluster)
    forth = stats.estimate(stats.ratio(one, other), len(rounds), resamples=50)
    back = stats.estimate(stats.ratio(other, one), len(rounds), resamples=50)
    assert forth.interval is not None
    assert back.interval is not None
    assert forth.value * back.value == pytest.approx(1)
    assert forth.interval[0] * back.interval[1] == pytest.approx(1)
    assert forth.interval[0] <= forth.value <= forth.interval[1]


@given(rounds_of_values, st.sampled_from([50, 90, 95, 99]))
def test_a_resampled_percentile_of_the_data_itself_is_numpys_nearest_rank(rounds: list[list[float]], q: int) -> None:
    values, cluster = flat(rounds)
    statistic = stats.percentile(values, cluster, q)
    assert statistic(np.ones((1, len(rounds))))[0] == np.percentile(values, q, method="inverted_cdf")
    twice_the_first = np.concatenate([values[cluster == 0], values])
    counts = np.ones((1, len(rounds)))
    counts[0, 0] = 2
    assert statistic(counts)[0] == np.percentile(twice_the_first, q, method="inverted_cdf")


@given(rounds_of_values, st.floats(0.1, 100))
def test_a_change_of_unit_changes_nothing_but_the_unit(rounds: list[list[float]], factor: float) -> None:
    values, cluster = flat(rounds)
    plain = stats.estimate(stats.mean(values, cluster), len(rounds), resamples=50)
    scaled = stats.estimate(stats.mean(values * factor, cluster), len(rounds), resamples=50)
    assert plain.interval is not None
    assert scaled.interval is not None
    assert scaled.value == pytest.approx(plain.value * factor)
    assert scaled.interval == pytest.approx((plain.interval[0] * factor, plain.interval[1] * factor))


def test_equal_rounds_give_an_interval_of_no_width() -> None:
    statistic = stats.mean(np.full(12, 3.0), np.repeat(np.arange(4), 3))
    assert stats.estimate(statistic, 4).interval == pytest.approx((3.0, 3.0))


def test_one_round_gives_a_value_and_no_interval() -> None:
    assert stats.estimate(stats.mean(np.array([1.0, 3.0]), np.array([0, 0])), 1) == stats.Estimate(2.0, None)


def test_a_rate_that_some_resample_makes_zero_gets_no_interval() -> None:
    goodput = stats.ratio_of_sums(np.array([0.0, 4.0]), np.array([1.0, 1.0]))
    assert stats.estimate(goodput, 2) == stats.Estimate(2.0, None)


def test_the_same_seed_gives_the_same_interval() -> None:
    statistic = stats.mean(np.arange(1.0, 25.0), np.repeat(np.arange(6), 4))
    assert stats.estimate(statistic, 6, seed=4) == stats.estimate(statistic, 6, seed=4)
    assert stats.estimate(statistic, 6, seed=4) != stats.estimate(statistic, 6, seed=5)


def test_percentiles_are_values_that_occurred() -> None:
    block = stats.percentiles(np.arange(1.0, 201.0))
    assert (block["p50"], block["p90"], block["p95"], block["p99"]) == (100.0, 180.0, 190.0, 198.0)
    assert (block["min"], block["max"], block["mean"]) == (1.0, 200.0, 100.5)


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (7, 2.3646), (10, 2.2281), (30, 2.0423), (120, 1.9799)],
)
def test_student_quantiles_are_those_of_the_printed_table(degrees: int, quantile: float) -> None:
    assert stats.student_quantile(0.975, degrees) == pytest.approx(quantile, abs=5e-5)
