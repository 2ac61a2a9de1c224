"""Measures a build beside its dense baseline: same prompts, same token counts, interleaved rounds. Imports no torch.

A round runs both sides on prompts that neither has seen, and the side that goes first alternates (ABBA), so that a slow
drift of the machine's clocks falls on both. Warm-up is a run of its own whose records are never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import metrics, stats
from benchmarks.config import Benchmark, Goodput, Workload
from benchmarks.drivers import in_process
from benchmarks.records import Record, write_jsonl
from benchmarks.workload import BenchRequest, make_requests

Side = Literal["dense", "built"]
Drive = Callable[[Any, Sequence[BenchRequest], int], list[Record]]
Progress = Callable[[str, int, int], None]

WARM_UP = 0  # the round whose records are dropped; measured rounds count from 1


@dataclass(frozen=True)
class Run:
    """One side's records of one round."""

    side: Side
    workload: int
    concurrency: int
    round: int
    records: tuple[Record, ...]


@dataclass(frozen=True)
class Comparison:
    """`points` is the report's `performance`; `runs` holds the raw records behind it."""

    points: list[dict[str, Any]]
    runs: list[Run]

    def write_records(self, path: Path) -> None:
        """Writes every raw record as a JSON line, labelled with its side, workload, concurrency and round."""
        write_jsonl(
            path,
            (
                {"side": run.side, "workload": run.workload, "concurrency": run.concurrency, "round": run.round}
                | asdict(record)
                for run in self.runs
                for record in run.records
            ),
        )


def compare(
    dense: Any,
    built: Any,
    config: Benchmark,
    vocabulary: int,
    progress: Progress = lambda *_: None,
    drive: Drive = in_process.run,
) -> Comparison:
    """Runs every workload at every concurrency on both sides.

    `dense` and `built` are whatever `drive` takes: engines for the in-process driver, endpoints for the HTTP drivers.
    Raises ValueError where no pair of requests of a point succeeded on both sides.
    """
    engines = {"dense": dense, "built": built}
    levels = [(index, level) for index, workload in enumerate(config.workloads) for level in workload.concurrency]
    steps = len(levels) * (config.rounds + 1)
    points, runs, done = [], [], 0
    for index, concurrency in levels:
        workload = config.workloads[index]
        label = f"{workload.input_tokens}+{workload.output_tokens} tokens at concurrency {concurrency}"
        measured = []
        for number in range(config.rounds + 1):
            requests = make_requests(workload, vocabulary, (index, concurrency, number))
            for side in _order(number):
                progress(f"{label}, {'warm-up' if number == WARM_UP else f'round {number}'}: {side}", done, steps)
                if number == WARM_UP:
                    drive(engines[side], requests[: 2 * concurrency], concurrency)
                else:
                    records = drive(engines[side], requests, concurrency)
                    measured.append(Run(side, index, concurrency, number, tuple(records)))
            done += 1
        points.append(summarise(measured, workload, concurrency, config.goodput))
        runs += measured
    progress("measured", steps, steps)
    return Comparison(points, runs)


def _order(number: int) -> tuple[Side, Side]:
    return ("dense", "built") if number % 2 else ("built", "dense")


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
