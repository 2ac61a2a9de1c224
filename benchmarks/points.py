"""From the runs of both sides to one point of the report: each metric of each side, and the paired speed-up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks import metrics, stats
from benchmarks.config import Goodput, Workload
from benchmarks.records import Record

Side = Literal["dense", "built"]


@dataclass(frozen=True)
class Run:
    """One side's records of one round."""

    side: Side
    workload: int
    concurrency: int
    round: int
    records: tuple[Record, ...]


def summarise(
    runs: Sequence[Run], workload: Workload, concurrency: int, levels: Goodput | None = None
) -> dict[str, Any]:
    """One point of the report's `performance`, from the runs of both sides at one workload and concurrency."""
    dense = [run for run in runs if run.side == "dense"]
    built = [run for run in runs if run.side == "built"]
    pairs = list(_pairs(dense, built))
    rounds = [number for number, _, _ in pairs]
    if not pairs:
        errors = [record.error for run in runs for record in run.records if record.error]
        raise ValueError(f"no request succeeded on both sides at concurrency {concurrency}: {errors[0]}")
    clusters = len(dense)
    statistics = {
        "dense": _statistics(dense, [left for _, left, _ in pairs], rounds, levels),
        "built": _statistics(built, [right for _, _, right in pairs], rounds, levels),
    }
    shared = [name for name in statistics["dense"] if name in statistics["built"]]
    return {
        "workload": workload.model_dump(exclude={"concurrency"}),
        "concurrency": concurrency,
        "rounds": clusters,
        "requests": len(pairs),
        "errors": {
            side: sum(r.error is not None for run in rs for r in run.records)
            for side, rs in (("dense", dense), ("built", built))
        },
        "dense": {name: _side_block(name, statistics["dense"][name], clusters) for name in shared},
        "built": {name: _side_block(name, statistics["built"][name], clusters) for name in shared},
        "speedup": {
            name: _speedup_block(name, statistics["dense"][name], statistics["built"][name], clusters)
            for name in shared
        },
        "limit": None,
    }


def _pairs(dense: Sequence[Run], built: Sequence[Run]) -> Iterator[tuple[int, Record, Record]]:
    """(round counted from 0, dense record, built record) of the requests that succeeded on both sides."""
    for number, (a, b) in enumerate(zip(dense, built, strict=True)):
        assert a.round == b.round
        for left, right in zip(a.records, b.records, strict=True):
            assert (left.id, left.input_tokens) == (right.id, right.input_tokens)
            if left.error is None and right.error is None:
                yield number, left, right


@dataclass(frozen=True)
class _Measured:
    """A metric of one side: how to compute it from resampled rounds, and its samples where it has one a request."""

    central: stats.Statistic
    samples: stats.Array | None = None
    ranks: dict[int, stats.Statistic] | None = None


RANKS = (50, 90, 95, 99)


def _statistics(
    runs: Sequence[Run], records: Sequence[Record], rounds: Sequence[int], levels: Goodput | None
) -> dict[str, _Measured]:
    measured = {}
    for name, function in metrics.PER_REQUEST.items():
        values = [(function(record), number) for record, number in zip(records, rounds, strict=True)]
        kept = [(value, number) for value, number in values if value is not None and value > 0]
        if kept and len(kept) == len(values):
            samples = np.array([value for value, _ in kept])
            cluster = np.array([number for _, number in kept])
            ranks = {q: stats.percentile(samples, cluster, q) for q in RANKS}
            measured[name] = _Measured(stats.mean(samples, cluster), samples, ranks)
    totals = [metrics.total(run.records, levels) for run in runs]
    seconds = np.array([total.seconds for total in totals])
    for name, counts in (
        ("output_token_throughput", [total.output_tokens for total in totals]),
        ("request_throughput", [total.requests for total in totals]),
        ("goodput", [total.good_requests for total in totals] if levels else None),
    ):
        if counts is not None:
            measured[name] = _Measured(stats.ratio_of_sums(np.array(counts, dtype=np.float64), seconds))
    return measured


def _side_block(name: str, measured: _Measured, clusters: int) -> dict[str, Any]:
    estimate = stats.estimate(measured.central, clusters)
    spread = {"mean": estimate.value} if measured.samples is None else stats.percentiles(measured.samples)
    return {"unit": metrics.METRICS[name].unit, **spread, "interval": estimate.interval}


def _speedup_block(name: str, dense: _Measured, built: _Measured, clusters: int) -> dict[str, Any]:
    """How many times better the build is: above 1 is faster, whichever way the metric counts."""

    def better(of_dense: stats.Statistic, of_built: stats.Statistic) -> dict[str, Any]:
        lower = metrics.METRICS[name].better == "lower"
        paired = stats.ratio(of_dense, of_built) if lower else stats.ratio(of_built, of_dense)
        estimate = stats.estimate(paired, clusters)
        return {"ratio": estimate.value, "interval": estimate.interval}

    block = better(dense.central, built.central)
    if dense.ranks and built.ranks:
        block |= {f"p{q}": better(dense.ranks[q], built.ranks[q]) for q in RANKS}
    return block
