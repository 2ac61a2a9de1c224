"""Shadow runs wait until the engines are idle; the state survives a restart; divergences are bounded."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calibration.routing import metrics, state
from calibration.routing.controller import Controller, Decision, Settings
from calibration.routing.divergence import mean_kl, partial_kl
from calibration.routing.metrics import METRICS, Sample
from calibration.routing.shadow import ShadowRuns
from plugins.common.errors import UserError
from tests.support.routing import BUDGET, Policy


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def value(controller: Controller, name: str) -> float:
    return controller.samples().get(Sample(name), 0.0)


def decision(controller: Controller, predicted: float = 0.01) -> Decision:
    return controller.decide(np.array([0.5, 0.5]), predicted)


def test_shadow_runs_wait_for_idle_engines_and_the_newest_are_dropped() -> None:
    controller = Controller(Policy(), Settings(shadow=1.0))
    idle = threading.Event()
    runs = ShadowRuns(controller, idle.is_set, size=4)
    for _ in range(10):
        runs.offer(decision(controller), lambda: BUDGET)
    time.sleep(0.1)
    assert value(controller, metrics.MEASURED) == 0
    assert value(controller, metrics.SHADOWS_DROPPED) in (5, 6)  # the thread may hold one
    idle.set()
    until(lambda: value(controller, metrics.MEASURED) + value(controller, metrics.SHADOWS_DROPPED) == 10)
    runs.stop()


def test_a_shadow_run_that_fails_harms_nothing() -> None:
    controller = Controller(Policy(), Settings(shadow=1.0))
    runs = ShadowRuns(controller, lambda: True)
    runs.offer(decision(controller), lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    runs.offer(decision(controller), lambda: BUDGET)
    until(lambda: value(controller, metrics.MEASURED) == 1)
    assert value(controller, metrics.SHADOWS_FAILED) == 1
    runs.stop()


def test_nothing_runs_for_a_request_beyond_the_threshold() -> None:
    controller = Controller(Policy(), Settings(shadow=1.0))
    runs = ShadowRuns(controller, lambda: True)
    runs.offer(decision(controller, predicted=9.0), lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    until(lambda: value(controller, metrics.MEASURED) == 1)
    assert value(controller, metrics.SHADOWS_FAILED) == 0
    runs.stop()


def test_a_restart_resumes_the_threshold(tmp_path: Path) -> None:
    path = tmp_path / "new" / "state.json"
    controller = Controller(Policy())
    for _ in range(20):
        controller.measured(decision(controller), 3 * BUDGET)
    state.save(controller, path)
    again = Controller(Policy())
    state.resume(again, path)
    assert again.state() == controller.state() != Controller(Policy()).state()
    assert [file.name for file in path.parent.iterdir()] == ["state.json"]


def test_no_file_is_a_fresh_start(tmp_path: Path) -> None:
    controller = Controller(Policy())
    state.resume(controller, tmp_path / "state.json")
    assert controller.state() == Controller(Policy()).state()


def test_another_builds_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    state.save(Controller(Policy(build_id="other")), path)
    with pytest.raises(UserError, match=r"is the state of build 'other', and the router is of build 'this': remove it"):
        state.resume(Controller(Policy()), path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '"a"',
        "\x00\xff",
        json.dumps({"build_id": "this"}),
        json.dumps({"build_id": "this", "threshold": "0.1", "measured": 1, "loss": 0}),
        '{"build_id": "this", "threshold": NaN, "measured": 1, "loss": 0}',
        '{"build_id": "this", "threshold": -1, "measured": 1, "loss": 0}',
        '{"build_id": "this", "threshold": true, "measured": 1, "loss": 0}',
    ],
)
def test_a_damaged_state_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "state.json"
    path.write_text(content, encoding="latin1")
    with pytest.raises(UserError, match="is not a state of a router") as caught:
        state.resume(Controller(Policy()), path)
    assert "\n" not in str(caught.value)


def test_a_state_cannot_open_a_router_that_only_dense_serves(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    state.save(Controller(Policy(threshold=0.5)), path)
    closed = Controller(Policy(threshold=0.0))
    state.resume(closed, path)
    assert decision(closed).variant == "dense"


@given(st.integers(0, 2**32), st.integers(1, 8))
def test_the_partial_divergence_never_exceeds_the_whole(seed: int, kept: int) -> None:
    random = np.random.default_rng(seed)
    dense_V, other_V = np.log(random.dirichlet(np.ones(12), 2) + 1e-12)
    whole = float((np.exp(dense_V) * (dense_V - other_V)).sum())
    tops = [dict(sorted(enumerate(values.tolist()), key=lambda item: -item[1])[:kept]) for values in (dense_V, other_V)]
    assert 0 <= partial_kl(*tops) <= whole + 1e-6
    everything = [dict(enumerate(values.tolist())) for values in (dense_V, other_V)]
    assert partial_kl(*everything) == pytest.approx(whole, abs=1e-6)


def test_equal_engines_do_not_diverge_and_no_token_is_no_measurement() -> None:
    one = {"a": np.log(0.6), "b": np.log(0.4)}
    assert mean_kl([(one, one)] * 3) == pytest.approx(0, abs=1e-9)
    assert partial_kl({}, {}) == 0
    with pytest.raises(ValueError, match="no token"):
        mean_kl([])


def test_the_metrics_page_has_each_metric_once_and_escapes_labels() -> None:
    controller = Controller(Policy())
    decision(controller)
    page = metrics.render({**controller.samples(), Sample(metrics.REQUESTS, (("variant", 'a"\\b\n'),)): 2})
    assert [line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")] == list(METRICS)
    assert 'twofour_router_requests_total{variant="built",quality="auto"} 1\n' in page
    assert 'twofour_router_requests_total{variant="a\\"\\\\b\\n"} 2\n' in page
    assert "twofour_router_shadows_failed_total 0\n" in page
    assert {sample.name for sample in controller.samples()} <= METRICS.keys()
