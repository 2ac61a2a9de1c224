"""From runs to one point of the report: each metric of each side, and the paired speed-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from benchmarks.config import Goodput, Workload
from benchmarks.serving import request_metrics, stats
from benchmarks.serving.records import Record
from plugins.common.errors import UserError

Side = Literal["dense", "built"]
SIDES: tuple[Side, Side] = ("dense", "built")


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
    """One point of the report's `performance`, from the runs of both sides at one workload and concurrency.

    A request that failed on one side counts on neither, and a round without any pair left is dropped.
    """
    paired = []
    for a, b in zip(_of(runs, "dense"), _of(runs, "built"), strict=True):
        assert [record.id for record in a.records] == [record.id for record in b.records]
        good = [(x, y) for x, y in zip(a.records, b.records, strict=True) if x.error is None and y.error is None]
        if good:
            paired.append((a, b, good))
    if not paired:
        raise UserError(_nothing(runs, concurrency))
    clusters = len(paired)
    dense = _statistics([a for a, _, _ in paired], [[x for x, _ in good] for _, _, good in paired], levels)
    built = _statistics([b for _, b, _ in paired], [[y for _, y in good] for _, _, good in paired], levels)
    shared = [name for name in dense if name in built]
    return {
        "workload": workload.model_dump(exclude={"concurrency"}),
        "concurrency": concurrency,
        "rounds": clusters,
        "requests": sum(len(good) for _, _, good in paired),
        "errors": {side: _failures(_of(runs, side)) for side in SIDES},
        "dense": {name: _side_block(name, dense[name], clusters) for name in shared},
        "built": {name: _side_block(name, built[name], clusters) for name in shared},
        "speedup": {name: _speedup_block(name, dense[name], built[name], clusters) for name in shared},
        "limit": None,
    }


def _of(runs: Sequence[Run], side: Side) -> list[Run]:
    return [run for run in runs if run.side == side]


def _failures(runs: Sequence[Run]) -> int:
    return sum(record.error is not None for run in runs for record in run.records)


def _nothing(runs: Sequence[Run], concurrency: int) -> str:
    side, first = next((run.side, record.error) for run in runs for record in run.records if record.error)
    return (
        f"no request succeeded at concurrency {concurrency} (the {side} side: {first}): "
        "check what serves it, and that it honours ignore_eos"
    )


@dataclass(frozen=True)
class _Measured:
    """A metric of one side: how to compute it from resampled rounds, and its samples where it has one a request."""

    central: stats.Statistic
    samples: stats.Array | None = None
    ranks: dict[int, stats.Statistic] | None = None


RANKS = (50, 90, 95, 99)


def _statistics(
    runs: Sequence[Run], records: Sequence[Sequence[Record]], levels: Goodput | None
) -> dict[str, _Measured]:
    """Each metric of one side; `records` are those of each run that count."""
    measured = {}
    cluster = np.repeat(np.arange(len(runs)), [len(of_run) for of_run in records])
    for name, function in request_metrics.PER_REQUEST.items():
        values = [function(record) for of_run in records for record in of_run]
        if all(values):  # none is missing, and none is zero
            samples = np.array(values, dtype=np.float64)
            ranks = {q: stats.percentile(samples, cluster, q) for q in RANKS}
            measured[name] = _Measured(stats.mean(samples, cluster), samples, ranks)
    totals = [request_metrics.total(run.records, levels) for run in runs]
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
    return {"unit": request_metrics.METRICS[name].unit, **spread, "interval": estimate.interval}


def _speedup_block(name: str, dense: _Measured, built: _Measured, clusters: int) -> dict[str, Any]:
    """How many times better the build is: above 1 is faster, whichever way the metric counts."""

    def better(of_dense: stats.Statistic, of_built: stats.Statistic) -> dict[str, Any]:
        lower = request_metrics.METRICS[name].better == "lower"
        paired = stats.ratio(of_dense, of_built) if lower else stats.ratio(of_built, of_dense)
        estimate = stats.estimate(paired, clusters)
        return {"ratio": estimate.value, "interval": estimate.interval}

    block = better(dense.central, built.central)
    if dense.ranks and built.ranks:
        block |= {f"p{q}": better(dense.ranks[q], built.ranks[q]) for q in RANKS}
    return block
