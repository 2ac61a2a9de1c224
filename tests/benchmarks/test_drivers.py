"""Drivers: an engine in process on a clock of ours, and real HTTP servers on loopback that stream, fail and stall."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from benchmarks.serving import request_metrics
from benchmarks.serving.drivers import in_process
from benchmarks.serving.workload import BenchRequest
from tests.support.bench_requests import ask


@dataclass
class Clock:
    """A clock that advances only on demand."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


@dataclass(frozen=True)
class Token:
    request_id: str
    last: bool
    time: float


@dataclass
class FakeEngine:
    """Takes `prefill_s` for each new request and `step_s` a step; `stop_after` ends each request early."""

    clock: Clock
    step_s: float = 0.01
    prefill_s: float = 0.1
    stop_after: int | None = None
    silent: bool = False
    running: dict[str, int] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)
    added: list[BenchRequest] = field(default_factory=list)
    most_at_once: int = 0

    def add(self, request: BenchRequest) -> None:
        self.added.append(request)
        self.running[request.id] = 0
        self.wanted[request.id] = min(request.max_new_tokens, self.stop_after or request.max_new_tokens)

    @property
    def busy(self) -> bool:
        return bool(self.running)

    def step(self) -> list[Token]:
        self.most_at_once = max(self.most_at_once, len(self.running))
        new = sum(done == 0 for done in self.running.values())
        self.clock.now += self.step_s + self.prefill_s * new
        if self.silent:
            return []
        tokens = []
        for name in list(self.running):
            self.running[name] += 1
            last = self.running[name] == self.wanted[name]
            tokens.append(Token(name, last, self.clock.now))
            if last:
                del self.running[name]
        return tokens


def drive(engine: FakeEngine, requests: list[BenchRequest], concurrency: int, **options: Any) -> list[Any]:
    return in_process.run(engine, requests, concurrency, clock=engine.clock, sleep=engine.clock.sleep, **options)


@pytest.mark.parametrize("concurrency", [1, 2, 4, 6])
def test_never_more_than_the_concurrency_is_in_the_engine(concurrency: int) -> None:
    engine = FakeEngine(Clock())
    records = drive(engine, ask(), concurrency)
    assert engine.most_at_once == concurrency
    assert [record.id for record in records] == [request.id for request in engine.added]
    assert all(record.error is None and record.output_tokens == 5 for record in records)


def test_times_in_process_are_those_of_the_engines_clock() -> None:
    record = drive(FakeEngine(Clock()), ask(requests=4)[:1], 1)[0]
    assert request_metrics.time_to_first_token(record) == pytest.approx(110)
    assert request_metrics.inter_token_latency(record) == pytest.approx(10)
    assert request_metrics.request_latency(record) == pytest.approx(150)


def test_a_closed_loop_counts_each_request_from_its_turn() -> None:
    records = drive(FakeEngine(Clock()), ask(), 1)
    assert [request_metrics.request_latency(record) for record in records] == pytest.approx([150] * 6)


def test_an_open_loop_counts_from_the_schedule_so_that_waiting_is_seen() -> None:
    clock = Clock()
    requests = [BenchRequest(str(index), (1,), 5, due=due) for index, due in enumerate((0.0, 0.01, 2.0))]
    records = drive(FakeEngine(clock), requests, 1)
    assert request_metrics.time_to_first_token(records[0]) == pytest.approx(110)
    assert request_metrics.time_to_first_token(records[1]) == pytest.approx(
        140 + 110
    )  # due at 10 ms, served after 150 ms
    assert records[2].start == pytest.approx(102.0)  # the driver slept until it was due
    assert request_metrics.time_to_first_token(records[2]) == pytest.approx(110)


def test_a_request_that_ends_early_in_process_is_an_error() -> None:
    records = drive(FakeEngine(Clock(), stop_after=3), ask(), 2)
    assert {record.error for record in records} == {"ended after 3 of 5 tokens"}


def test_an_engine_that_gives_no_tokens_is_left_after_the_stall_limit() -> None:
    engine = FakeEngine(Clock(), silent=True)
    records = drive(engine, ask(), 2, stall_s=3.0)
    assert engine.clock.now < 104
    assert {record.error for record in records} == {"ended after 0 of 5 tokens"}
