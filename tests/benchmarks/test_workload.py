"""Workloads: the same everywhere for a seed, apart for each round, and arrivals at the rate asked."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from benchmarks.config import Benchmark, Workload
from benchmarks.serving.workload import make_requests

WORKLOAD = Workload(input_tokens=16, output_tokens=4, requests=8)


def test_the_same_seed_and_stream_give_the_same_requests() -> None:
    assert make_requests(WORKLOAD, 1000, (0, 4, 1)) == make_requests(WORKLOAD, 1000, (0, 4, 1))


def test_the_prompts_of_a_seed_never_change() -> None:
    """A golden value: results of different versions compare only if the prompts stay."""
    first = make_requests(Workload(input_tokens=4, requests=4), 32000, (0, 1, 1))[0]
    assert (first.id, first.input_ids) == ("0-1-1-0", (30974, 23868, 20546, 4616))


def test_no_prompt_of_a_round_starts_like_one_of_another_round() -> None:
    starts = [request.input_ids[:4] for round in range(20) for request in make_requests(WORKLOAD, 32000, (0, 4, round))]
    assert len(set(starts)) == len(starts)


def test_another_seed_gives_other_prompts() -> None:
    other = WORKLOAD.model_copy(update={"seed": 1})
    assert make_requests(WORKLOAD, 1000)[0].input_ids != make_requests(other, 1000)[0].input_ids


@given(
    vocabulary=st.integers(1, 200_000), length=st.integers(1, 64), output=st.integers(1, 64), requests=st.integers(4, 9)
)
def test_lengths_are_exact_and_ids_are_in_the_vocabulary(
    vocabulary: int, length: int, output: int, requests: int
) -> None:
    made = make_requests(Workload(input_tokens=length, output_tokens=output, requests=requests), vocabulary)
    assert len({request.id for request in made}) == len(made) == requests
    for request in made:
        assert len(request.input_ids) == length
        assert request.max_new_tokens == output
        assert request.ignore_eos
        assert all(0 <= token < vocabulary for token in request.input_ids)


def test_a_closed_loop_has_all_requests_at_hand() -> None:
    assert [request.due for request in make_requests(WORKLOAD, 100)] == [0.0] * 8


def test_poisson_arrivals_come_at_the_rate_asked() -> None:
    workload = Workload(input_tokens=1, requests=4000, arrival="poisson", request_rate=20.0)
    due = [request.due for request in make_requests(workload, 10)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert due[0] == 0
    assert min(gaps) > 0
    assert sum(gaps) / len(gaps) == pytest.approx(1 / 20, rel=0.05)
    variance = sum((gap - 1 / 20) ** 2 for gap in gaps) / len(gaps)
    assert variance**0.5 == pytest.approx(1 / 20, rel=0.1)  # exponential: the deviation is the mean


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"arrival": "poisson"}, "request_rate"),
        ({"request_rate": 5.0}, "request_rate"),
        ({"requests": 2, "concurrency": (1, 4)}, "requests is 2"),
        ({"concurrency": ()}, "at least 1"),
        ({"concurrency": (0,)}, "greater than or equal to 1"),
        ({"input_token": 5}, "Extra inputs"),
    ],
)
def test_a_workload_that_makes_no_sense_is_refused(fields: dict[str, object], fragment: str) -> None:
    with pytest.raises(ValidationError, match=fragment):
        Workload.model_validate(fields)


def test_a_benchmark_needs_a_workload() -> None:
    with pytest.raises(ValidationError):
        Benchmark(workloads=())
