"""The router in service: bad prompts, clocks that jump, and what a restart finds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.routing import metrics
from calibration.routing.controller import Settings
from calibration.routing.metrics import Sample
from calibration.routing.service import RouterService
from plugins.common.errors import UserError
from tests.support.routing import BUDGET, EASY, HARD, UNREADABLE, distributions, learned_router, prefill_router

ALL = Settings(shadow=1.0)


def wait(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def until_measured(service: RouterService, count: int) -> None:
    wait(lambda: service.samples().get(Sample(metrics.MEASURED), 0) >= count)


@pytest.mark.parametrize(
    ("prompt", "answers"), [(EASY, "built"), (HARD, "dense"), (UNREADABLE, "dense"), (None, "dense"), ([5], "built")]
)
def test_a_prompts_tokens_decide(prompt: list[int] | None, answers: str) -> None:
    service = RouterService(learned_router(), idle=lambda: True)
    assert service.decide(None if prompt is None else np.array(prompt, np.int64)).variant == answers
    service.close()


def test_an_empty_prompt_is_refused_and_counts_nothing() -> None:
    service = RouterService(learned_router(), idle=lambda: True)
    with pytest.raises(UserError, match="the prompt is empty"):
        service.decide(np.array([], np.int64))
    assert Sample(metrics.TIMED) not in service.samples()
    service.close()


def jumping() -> Iterator[float]:
    while True:
        yield from (1e9, -1e9, 0.0, 5.0, 1e18, -5.0)


def test_a_clock_that_jumps_breaks_nothing(tmp_path: Path) -> None:
    times = jumping()
    service = RouterService(learned_router(), lambda: True, ALL, tmp_path / "state.json", clock=lambda: next(times))
    for count in range(30):
        decision = service.decide(np.array(EASY))
        assert decision.variant == "built"
        service.answered(decision, lambda: BUDGET)
        until_measured(service, count + 1)
    service.close()
    samples = service.samples()
    assert samples[Sample(metrics.SECONDS)] >= 0
    assert json.loads((tmp_path / "state.json").read_text())["measured"] == 30


def test_the_state_is_written_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    path, now = tmp_path / "state.json", [0.0]
    service = RouterService(learned_router(), lambda: True, ALL, path, clock=lambda: now[0])

    def measure(count: int) -> None:
        service.answered(service.decide(np.array(EASY)), lambda: 5 * BUDGET)
        until_measured(service, count)

    def written(count: int) -> bool:
        return path.exists() and json.loads(path.read_text())["measured"] == count

    measure(1)
    wait(lambda: written(1))
    measure(2)
    time.sleep(0.05)
    assert written(1)
    now[0] = 11.0
    measure(3)
    wait(lambda: written(3))
    measure(4)
    service.close()
    again = RouterService(learned_router(), lambda: True, ALL, path)
    assert again.controller.state() == service.controller.state()
    assert again.controller.state()["threshold"] < learned_router().threshold
    again.close()


def test_a_place_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    service = RouterService(learned_router(), lambda: True, ALL, tmp_path / "file" / "state.json")
    assert service.decide(np.array(EASY)).variant == "built"
    service.close()


@pytest.mark.parametrize(("chance", "answers"), [(0.0, "built"), (1.0, "dense")])
def test_the_prefill_decides(chance: float, answers: str) -> None:
    service = RouterService(prefill_router(), idle=lambda: True)
    [next_token] = distributions(np.array([chance]), seed=1)
    assert service.decide(np.array(EASY), lambda: next_token).variant == answers
    service.close()


@pytest.mark.parametrize(
    ("asked", "answers"),
    [
        ({"quality": "high"}, "dense"),
        ({"quality": "fast"}, "built"),
        ({"variant": "built"}, "built"),
        ({"up": {"dense"}}, "dense"),
        ({"up": {"dense", "built"}, "full": {"built"}}, "dense"),
        ({"up": {"built"}, "full": {"built"}}, "built"),  # nothing better is up
    ],
)
def test_the_prefill_runs_only_where_it_may_decide(asked: dict[str, Any], answers: str) -> None:
    service = RouterService(prefill_router(), idle=lambda: True)
    decision = service.decide(np.array(EASY), lambda: pytest.fail("the prefill ran"), **asked)
    assert decision.variant == answers
    service.close()


def test_a_prefill_that_does_not_answer_is_dense_and_moves_no_threshold() -> None:
    service = RouterService(prefill_router(), lambda: True, ALL)
    before = service.controller.state()
    for _ in range(50):
        decision = service.decide(np.array(EASY), lambda: None)
        assert (decision.variant, decision.shadow) == ("dense", False)
        service.answered(decision, lambda: pytest.fail("measured"))
    samples = service.samples()
    assert samples[Sample(metrics.UNPREDICTED)] == 50
    assert samples[Sample(metrics.DRIFT)] == 0
    assert service.controller.state() == before
    service.close()
