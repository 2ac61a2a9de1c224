"""Comparison: what is interleaved with what, what counts, and that the verdict on equal engines is `no difference`."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.config import Benchmark, Goodput, Workload
from benchmarks.roofline import roofline
from benchmarks.roofline.utilization import ModelCost, add_limits
from benchmarks.serving.compare import compare
from benchmarks.serving.records import Record
from benchmarks.serving.summarize import Run, summarise
from benchmarks.serving.workload import BenchRequest
from plugins.common.linear_shape import LinearShape
from tests.support.records import read_records

WORKLOAD = Workload(input_tokens=8, output_tokens=5, requests=4, concurrency=(2, 4))


class Side:
    """Serves requests at a pace, with noise; notes what it was asked. Stands where an engine or an endpoint would."""

    def __init__(self, name: str, pace: float, log: list[tuple[str, tuple[str, ...], int]], noise: float = 0.0) -> None:
        self.name, self.pace, self.log, self.noise = name, pace, log, noise
        self.random = random.Random(name)
        self.fails: set[str] = set()
        self.prompts: list[tuple[int, ...]] = []
        self.now = 0.0

    def serve(self, requests: Sequence[BenchRequest], concurrency: int) -> list[Record]:
        self.prompts += [request.input_ids for request in requests]
        self.log.append((self.name, tuple(request.id for request in requests), concurrency))
        mood = self.random.lognormvariate(0, self.noise)
        records = []
        for index, request in enumerate(requests):
            start = self.now + index // concurrency * self.pace * mood * 10
            pace = self.pace * mood * self.random.lognormvariate(0, self.noise)
            times = tuple(start + pace * (2 + token) for token in range(request.max_new_tokens))
            error = "HTTP 500" if request.id in self.fails else None
            records.append(Record(request.id, len(request.input_ids), len(times), start, times, error))
        self.now = max(record.end for record in records) + 1
        return records


def drive(side: Side, requests: Sequence[BenchRequest], concurrency: int) -> list[Record]:
    return side.serve(requests, concurrency)


def measure(dense: Side, built: Side, **options: Any) -> Any:
    config = Benchmark(**{"workloads": (WORKLOAD,), "rounds": 4, **options})
    return compare(dense, built, config, vocabulary=100, drive=drive)


def pair(dense_pace: float = 0.002, built_pace: float = 0.001, noise: float = 0.0) -> tuple[Side, Side, list[Any]]:
    log: list[Any] = []
    return Side("dense", dense_pace, log, noise), Side("built", built_pace, log, noise), log


def test_sides_alternate_and_see_the_same_prompts() -> None:
    dense, built, log = pair()
    measure(dense, built)
    at_two = [entry for entry in log if entry[2] == 2]
    assert [name for name, _, _ in at_two[2:]] == ["dense", "built", "built", "dense"] * 2
    for first, second in zip(at_two[::2], at_two[1::2], strict=True):
        assert first[1] == second[1]


def test_no_record_of_the_warm_up_is_kept() -> None:
    dense, built, log = pair()
    result = measure(dense, built)
    warm = {name for _, ids, _ in log[:2] for name in ids}
    kept = {record.id for run in result.runs for record in run.records}
    assert warm
    assert not warm & kept
    assert len(kept) == 2 * 4 * WORKLOAD.requests  # concurrencies x rounds x requests


def test_no_prompt_is_sent_twice_to_a_side() -> None:
    dense, built, _ = pair()
    measure(dense, built)
    assert sorted(dense.prompts) == sorted(built.prompts)
    assert len(set(dense.prompts)) == len(dense.prompts)


def test_a_build_twice_as_fast_is_twice_as_fast_in_every_metric() -> None:
    dense, built, _ = pair()
    result = measure(dense, built, goodput=Goodput(request_latency=1000))
    assert [point["concurrency"] for point in result.points] == [2, 4]
    for point in result.points:
        assert set(point["speedup"]) == {
            "time_to_first_token",
            "inter_token_latency",
            "request_latency",
            "output_token_throughput_per_user",
            "output_token_throughput",
            "request_throughput",
            "goodput",
        }
        for speedup in point["speedup"].values():
            assert speedup["ratio"] == pytest.approx(2)
            assert speedup["interval"] == pytest.approx((2, 2))
        assert point["speedup"]["request_latency"]["p99"]["ratio"] == pytest.approx(2)
        assert point["dense"]["inter_token_latency"]["p50"] == pytest.approx(2)
        assert (point["requests"], point["rounds"], point["errors"]) == (16, 4, {"dense": 0, "built": 0})


def test_a_request_that_fails_on_one_side_counts_on_neither() -> None:
    dense, built, _ = pair()
    built.fails = {"0-2-1-0"}
    point = measure(dense, built).points[0]
    assert (point["requests"], point["errors"]) == (15, {"dense": 0, "built": 1})


def test_a_point_where_nothing_succeeded_is_an_error_with_its_cause() -> None:
    dense, built, _ = pair()
    built.fails = {f"0-2-{round}-{index}" for round in range(5) for index in range(4)}
    with pytest.raises(ValueError, match="HTTP 500"):
        measure(dense, built)


def test_a_round_that_failed_whole_is_left_out() -> None:
    dense, built, _ = pair()
    built.fails = {f"0-2-4-{index}" for index in range(4)}
    point = measure(dense, built).points[0]
    assert (point["rounds"], point["requests"], point["errors"]["built"]) == (3, 12, 4)
    assert point["speedup"]["output_token_throughput"]["ratio"] == pytest.approx(2)


@pytest.mark.slow
def test_equal_engines_are_called_equal_95_percent_of_the_time() -> None:
    """A/A: the same pace on both sides, with noise of the machine in each round and each request."""
    calls = 0
    for seed in range(60):
        dense, built = Side(f"a{seed}", 0.001, [], 0.1), Side(f"b{seed}", 0.001, [], 0.1)
        config = Benchmark(workloads=(WORKLOAD.model_copy(update={"concurrency": (2,)}),), rounds=5)
        point = compare(dense, built, config, 100, drive=drive).points[0]
        low, high = point["speedup"]["output_token_throughput"]["interval"]
        calls += low <= 1 <= high
    assert calls >= 51  # 57 expected; with a true 95% fewer than 51 come about once in a thousand


def test_one_round_is_measured_without_intervals() -> None:
    dense, built, _ = pair()
    point = measure(dense, built, rounds=1).points[0]
    assert point["speedup"]["output_token_throughput"]["ratio"] == pytest.approx(2)
    assert point["speedup"]["output_token_throughput"]["interval"] is None


def test_raw_records_are_kept_with_their_side_and_round(tmp_path: Path) -> None:
    dense, built, _ = pair()
    result = measure(dense, built)
    result.write_records(tmp_path / "records.jsonl")
    assert read_records(tmp_path / "records.jsonl") == [record for run in result.runs for record in run.records]


def test_progress_counts_up_to_the_end() -> None:
    dense, built, _ = pair()
    seen: list[tuple[str, int, int]] = []
    compare(dense, built, Benchmark(workloads=(WORKLOAD,), rounds=2), 100, lambda *step: seen.append(step), drive)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2] == 6
    assert "warm-up" in seen[0][0]


def points_at(seconds_per_token: float) -> list[dict[str, Any]]:
    times = tuple(1.0 + seconds_per_token * token for token in range(5))
    record = Record("a", 8, 5, 0.0, times)
    runs = [Run(side, 0, 1, 1, (record,)) for side in ("dense", "built")]
    return [summarise(runs, WORKLOAD, 1)]


COSTS = {
    "dense": ModelCost([LinearShape(4096, 4096)] * 100, 0),
    "built": ModelCost([LinearShape(4096, 4096, "fp8", 1.0)] * 100, 0),
}


def test_the_share_of_the_limit_stands_beside_each_side() -> None:
    points = points_at(0.002)
    card = roofline.gpu("H100")
    add_limits(points, COSTS, card)
    limit = points[0]["limit"]
    moved, launches = 100 * 4096 * 4096 * 2, 100 * card.launch_us * 1e-6
    assert limit["dense"]["gigabytes_per_second"] == pytest.approx(moved / 0.002 / 1e9)
    assert limit["dense"]["share"] == pytest.approx((moved / 3350e9 + launches) / 0.002, rel=0.02)
    assert limit["built"]["share"] == pytest.approx((0.3125 * moved / 3350e9 + launches) / 0.002, rel=0.02)
    assert "H100 SXM 80GB limit" in limit["message"]


def test_a_figure_above_the_limit_is_called_wrong() -> None:
    points = points_at(0.0005)
    add_limits(points, COSTS, roofline.gpu("H100"))
    assert points[0]["limit"]["dense"]["share"] > 1
    assert "above the limit" in points[0]["limit"]["message"]


def test_no_limit_is_made_up_for_a_cpu() -> None:
    points = points_at(0.5)
    add_limits(points, COSTS, None)
    assert points[0]["limit"]["dense"]["share"] is None
    assert "no limit is known" in points[0]["limit"]["message"]
