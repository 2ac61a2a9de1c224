"""Percentiles, and bootstrap intervals that respect how the data came about. Imports no torch.

Requests of one round share the machine's state, so they are not independent samples: whole rounds are resampled (a
cluster bootstrap). Rounds are few, so the bootstrap's standard error is widened by sqrt(C / (C - 1)) and carried by
Student's t with C - 1 degrees of freedom (Hesterberg, What Teachers Should Know About the Bootstrap, 2015). Everything
here is positive (times, rates, ratios), so intervals are made on the logarithm: swapping the sides of a ratio inverts
its interval.

Legend of shapes: C clusters, B resamples, S samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Multiplicities of the clusters [B, C] -> the statistic of each resample [B]."""

CHUNK = 1 << 22  # numbers that one step of a resampled percentile may hold: 32 MB
PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


@dataclass(frozen=True)
class Estimate:
    """A value and its interval; None where the interval cannot be had (one cluster, or a value of zero)."""

    value: float
    interval: tuple[float, float] | None


def percentiles(values_S: Array) -> dict[str, float]:
    """min, p1 ... p99, max, mean and std of the samples. A percentile is a value that occurred (nearest rank)."""
    ranked = np.percentile(values_S, PERCENTILES, method="inverted_cdf")
    return {
        "mean": float(values_S.mean()),
        "min": float(values_S.min()),
        **{f"p{q}": float(value) for q, value in zip(PERCENTILES, ranked, strict=True)},
        "max": float(values_S.max()),
        "std": float(values_S.std()),
    }


def ratio_of_sums(numerator_C: Array, denominator_C: Array) -> Statistic:
    """sum(numerator) / sum(denominator): a rate, or a mean where the denominator holds the counts."""
    return lambda counts_BC: (counts_BC @ numerator_C) / (counts_BC @ denominator_C)


def mean(values_S: Array, cluster_S: NDArray[np.int64]) -> Statistic:
    """The mean of all samples."""
    size = int(cluster_S.max()) + 1
    sums = np.bincount(cluster_S, weights=values_S, minlength=size).astype(np.float64)
    return ratio_of_sums(sums, np.bincount(cluster_S, minlength=size).astype(np.float64))


def percentile(values_S: Array, cluster_S: NDArray[np.int64], q: float) -> Statistic:
    """The q-th percentile (nearest rank) of all samples."""
    order = np.argsort(values_S, kind="stable")
    ranked, cluster = values_S[order], cluster_S[order]

    def of_some(counts_BC: Array) -> Array:
        cumulative_BS = np.cumsum(counts_BC[:, cluster], axis=1)
        target_B1 = q / 100 * cumulative_BS[:, -1:] * (1 - 1e-12)
        first: Array = ranked[np.argmax(cumulative_BS >= target_B1, axis=1)]
        return first

    def statistic(counts_BC: Array) -> Array:
        parts = math.ceil(len(counts_BC) * len(ranked) / CHUNK)
        return np.concatenate([of_some(part) for part in np.array_split(counts_BC, parts)])

    return statistic


def ratio(above: Statistic, below: Statistic) -> Statistic:
    """The paired ratio: both sides are resampled by the same clusters."""
    return lambda counts_BC: above(counts_BC) / below(counts_BC)


def estimate(
    statistic: Statistic, clusters: int, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """The statistic of the data and its interval at `confidence`. Same arguments, same interval."""
    value = float(statistic(np.ones((1, clusters)))[0])
    if clusters < 2 or value <= 0:
        return Estimate(value, None)
    random = np.random.default_rng(seed)
    counts_BC = random.multinomial(clusters, np.full(clusters, 1 / clusters), size=resamples).astype(np.float64)
    replicates_B = statistic(counts_BC)
    if replicates_B.min() <= 0:
        return Estimate(value, None)
    error = float(np.log(replicates_B).std()) * math.sqrt(clusters / (clusters - 1))
    reach = student_quantile((1 + confidence) / 2, clusters - 1) * error
    return Estimate(value, (value * math.exp(-reach), value * math.exp(reach)))


def student_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution."""
    from scipy.stats import t as student

    return float(student.ppf(probability, degrees))
