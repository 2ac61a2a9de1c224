"""Measures a build against its dense baseline: same prompts, same token counts, interleaved rounds. Imports no torch.

A round runs both sides on prompts that neither has seen, and the side that goes first alternates (ABBA), so that a slow
drift of the machine's clocks falls on both. Warm-up is a separate run whose records are discarded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.config import Benchmark, Workload
from benchmarks.serving.drivers import in_process
from benchmarks.serving.records import Record, write_jsonl
from benchmarks.serving.summarize import Run, Side, summarise
from benchmarks.serving.workload import BenchRequest, make_requests
from plugins.common.progress import Progress, silent

Drive = Callable[[Any, Sequence[BenchRequest], int], list[Record]]

WARM_UP = 0  # the round whose records are dropped; measured rounds count from 1


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
    progress: Progress = silent,
    drive: Drive = in_process.run,
) -> Comparison:
    """Runs every workload at every concurrency on both sides.

    `dense` and `built` are whatever `drive` takes: engines for the in-process driver, endpoints for the HTTP drivers.
    Raises UserError where no pair of requests of a point succeeded on both sides.
    """
    levels = list(_levels({"dense": dense, "built": built}, config, vocabulary, progress, drive))
    points = [summarise(runs, workload, concurrency, config.goodput) for workload, concurrency, runs in levels]
    return Comparison(points, [run for _, _, runs in levels for run in runs])


def _levels(
    sides: dict[Side, Any], config: Benchmark, vocabulary: int, progress: Progress, drive: Drive
) -> Iterator[tuple[Workload, int, list[Run]]]:
    """Each workload at each concurrency, with its measured runs."""
    levels = [(index, level) for index, workload in enumerate(config.workloads) for level in workload.concurrency]
    steps, done = len(levels) * (config.rounds + 1), 0
    for index, concurrency in levels:
        workload = config.workloads[index]
        label = f"{workload.input_tokens}+{workload.output_tokens} tokens at concurrency {concurrency}"
        runs = []
        for number in range(config.rounds + 1):
            progress(f"{label}, {'warm-up' if number == WARM_UP else f'round {number}'}", done, steps)
            requests = make_requests(workload, vocabulary, (index, concurrency, number))
            for side in sorted(sides, reverse=number % 2 == 1):  # dense first in round 1, built first in round 2, ...
                if number == WARM_UP:
                    drive(sides[side], requests[: 2 * concurrency], concurrency)
                else:
                    records = drive(sides[side], requests, concurrency)
                    runs.append(Run(side, index, concurrency, number, tuple(records)))
            done += 1
        yield workload, concurrency, runs
    progress("measured", steps, steps)
