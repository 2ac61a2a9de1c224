"""Metrics: AIPerf's formulas on records whose times are known, goodput, and AIPerf's file form."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.config import Goodput
from benchmarks.serving import request_metrics
from benchmarks.serving.aiperf_export import export_aiperf
from benchmarks.serving.records import Record
from benchmarks.serving.request_metrics import METRICS, PER_REQUEST

RECORD = Record("a", 100, 5, start=10.0, token_times=(10.2, 10.3, 10.4, 10.5, 10.6))
FAILED = Record("b", 100, 0, start=10.0, token_times=(), error="HTTP 500")


def test_a_request_of_known_times() -> None:
    assert request_metrics.time_to_first_token(RECORD) == pytest.approx(200)
    assert request_metrics.request_latency(RECORD) == pytest.approx(600)
    assert request_metrics.inter_token_latency(RECORD) == pytest.approx((600 - 200) / (5 - 1))
    assert request_metrics.output_token_throughput_per_user(RECORD) == pytest.approx(10)


def test_chunks_of_several_tokens_count_as_tokens() -> None:
    chunked = Record("a", 100, 5, start=10.0, token_times=(10.2, 10.6))
    assert request_metrics.inter_token_latency(chunked) == request_metrics.inter_token_latency(RECORD)


def test_one_token_has_no_inter_token_latency() -> None:
    single = Record("a", 1, 1, start=0.0, token_times=(0.5,))
    assert request_metrics.inter_token_latency(single) is None
    assert request_metrics.output_token_throughput_per_user(single) is None
    assert request_metrics.time_to_first_token(single) == request_metrics.request_latency(single) == 500


def test_rates_of_a_run_count_from_the_first_start_to_the_last_token() -> None:
    later = Record("c", 100, 5, start=10.5, token_times=(10.7, 11.0, 11.3, 11.6, 12.0))
    totals = request_metrics.total([RECORD, later])
    assert totals.seconds == pytest.approx(2.0)
    assert totals.output_token_throughput == pytest.approx(5.0)
    assert totals.request_throughput == pytest.approx(1.0)
    assert totals.goodput is None


def test_a_failed_request_takes_time_but_gives_no_tokens() -> None:
    early = Record("b", 100, 0, start=9.0, token_times=(), error="HTTP 500")
    totals = request_metrics.total([early, RECORD])
    assert (totals.requests, totals.output_tokens) == (1, 5)
    assert totals.seconds == pytest.approx(1.6)


def test_a_run_without_a_success_has_no_rates() -> None:
    with pytest.raises(ValueError, match="no request"):
        request_metrics.total([FAILED])


@pytest.mark.parametrize(
    ("levels", "good"),
    [
        (Goodput(time_to_first_token=250), 1),
        (Goodput(time_to_first_token=150), 0),
        (Goodput(time_to_first_token=250, inter_token_latency=101), 1),
        (Goodput(time_to_first_token=250, inter_token_latency=99), 0),
        (Goodput(request_latency=600.001), 1),
        (Goodput(), 1),
    ],
)
def test_goodput_counts_requests_that_meet_every_level(levels: Goodput, good: int) -> None:
    totals = request_metrics.total([RECORD, FAILED], levels)
    assert totals.good_requests == good
    assert totals.goodput == pytest.approx(good / 0.6)


times = st.lists(st.floats(1e-6, 10), min_size=2, max_size=30).map(
    lambda gaps: tuple(sum(gaps[: index + 1]) for index in range(len(gaps)))
)


@given(times)
def test_latency_is_the_first_token_plus_the_rest(moments: tuple[float, ...]) -> None:
    record = Record("x", 1, len(moments), start=0.0, token_times=moments)
    first, each, whole = (
        PER_REQUEST[name](record) for name in ("time_to_first_token", "inter_token_latency", "request_latency")
    )
    assert first is not None
    assert each is not None
    assert whole == pytest.approx(first + each * (len(moments) - 1))


def test_every_metric_has_a_unit_and_a_direction() -> None:
    assert set(PER_REQUEST) < set(METRICS)
    assert {metric.better for metric in METRICS.values()} == {"lower", "higher"}


def test_the_export_is_aiperfs_profile_export(tmp_path: Path) -> None:
    export_aiperf([RECORD, FAILED], tmp_path / "profile_export.jsonl", epoch_offset=1_700_000_000.0)
    good, failed = map(json.loads, (tmp_path / "profile_export.jsonl").read_text().splitlines())
    assert good["metadata"]["request_start_ns"] == 1_700_000_010_000_000_000
    assert good["metadata"]["request_end_ns"] - good["metadata"]["request_start_ns"] == pytest.approx(6e8, abs=1e3)
    assert good["metrics"]["time_to_first_token"] == {"value": pytest.approx(200), "unit": "ms"}
    assert good["metrics"]["output_token_throughput_per_user"]["unit"] == "tokens/sec/user"
    assert good["metrics"]["inter_chunk_latency"]["value"] == pytest.approx([100] * 4)
    assert good["metrics"]["output_sequence_length"] == {"value": 5, "unit": "tokens"}
    assert good["error"] is None
    assert failed["metrics"] is None
    assert failed["error"]["message"] == "HTTP 500"
