"""Servers behind the proxy that are down, full, slow or foreign; shadow runs and metrics."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from math import log
from pathlib import Path

import pytest

from builder.deploy.route import Options, make_proxy
from calibration.routing import metrics
from calibration.routing.controller import Settings
from plugins.common.errors import UserError
from tests.support.openai_server import OpenAIServer, until
from tests.support.route_proxy import DOCS_LLAMA, complete, metric, routed
from tests.support.route_proxy import servers as servers
from tests.support.routing import EASY, SEEN, learned_router


def test_a_dead_server_is_routed_around_until_it_is_back() -> None:
    dense, built = OpenAIServer("dense"), OpenAIServer("built")
    with dense.running():
        with built.running(), routed(dense, built) as client:
            assert complete(client).headers["x-twofour-variant"] == "built"
        with routed(dense, built) as client:
            assert [complete(client).headers["x-twofour-variant"] for _ in range(5)] == ["dense"] * 5
            assert dense.answered() == 5
            until(lambda: client.get("/health").json() == {"up": {"dense": True, "built": False}})
            with built.running():
                until(lambda: client.get("/health").json()["up"]["built"])
                assert complete(client).headers["x-twofour-variant"] == "built"


def test_no_server_up_is_said_so() -> None:
    dense, built = OpenAIServer("dense"), OpenAIServer("built")
    with dense.running(), built.running():
        pass
    with routed(dense, built) as client:
        response = complete(client)
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "no variant is up: try again later"
        assert client.get("/health").status_code == 503


@pytest.mark.parametrize(
    ("quality", "refusing", "status", "answers"),
    [
        ("auto", ["built"], 200, "dense"),
        ("fast", ["built"], 200, "dense"),
        ("high", ["dense"], 429, "dense"),  # never poorer than asked while dense is up
        ("fast", ["dense", "built"], 429, "dense"),
    ],
)
def test_a_full_server_is_routed_around_but_never_to_a_poorer_one(
    servers: tuple[OpenAIServer, OpenAIServer], quality: str, refusing: list[str], status: int, answers: str
) -> None:
    for server in servers:
        server.status = 429 if server.name in refusing else 200
    with routed(*servers) as client:
        response = complete(client, quality=quality)
        assert (response.status_code, response.headers["x-twofour-variant"]) == (status, answers)


def test_capacity_makes_a_server_full(servers: tuple[OpenAIServer, OpenAIServer]) -> None:
    gate = servers[1].gate = threading.Semaphore(0)
    with routed(*servers, capacity=1) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(complete, client)
        until(lambda: servers[1].open_requests == 1)
        assert complete(client).headers["x-twofour-variant"] == "dense"
        gate.release(4)
        assert first.result().headers["x-twofour-variant"] == "built"


def test_a_server_that_dies_before_its_answer_is_answered_for_once(servers: tuple[OpenAIServer, OpenAIServer]) -> None:
    servers[1].dies_after = 2
    with routed(*servers) as client:
        response = complete(client)
        assert (response.status_code, response.headers["x-twofour-variant"]) == (200, "dense")
        assert [server.answered() for server in servers] == [1, 1]
        assert metric(client, metrics.REROUTED) == 1


def test_a_stream_that_breaks_off_ends_with_an_error(servers: tuple[OpenAIServer, OpenAIServer]) -> None:
    servers[1].dies_after = 2

    with (
        routed(*servers) as client,
        client.stream("POST", "/v1/completions", json={"prompt": EASY, "stream": True}) as response,
    ):
        *texts, last = [json.loads(line.removeprefix("data: ")) for line in response.iter_lines() if line]
    assert [event["choices"][0]["text"] for event in texts] == ["built0 ", "built1 "]
    assert "variant 'built' broke off" in last["error"]["message"]
    assert servers[0].answered() == 0, "a second answer after half of the first"


def test_every_request_gets_its_own_answer_while_a_server_dies(servers: tuple[OpenAIServer, OpenAIServer]) -> None:
    def ask(index: int) -> str:
        if index == 100:
            servers[1].dies_after = 0
        return str(complete(client, max_tokens=1 + index % 7).json()["choices"][0]["text"])

    with routed(*servers) as client, ThreadPoolExecutor(16) as pool:
        texts = list(pool.map(ask, range(300)))
        assert metric(client, metrics.REQUESTS) == 300
    assert [len(text.split()) for text in texts] == [1 + index % 7 for index in range(300)]


@pytest.mark.parametrize(("path", "seen"), [("/v1/completions", "completions"), ("/v1/chat/completions", "chat")])
def test_shadow_runs_measure_the_divergence_after_the_answer_divided_by_the_share_that_they_see(
    servers: tuple[OpenAIServer, OpenAIServer], path: str, seen: str
) -> None:
    dense, built = servers
    dense.probability, built.probability = 0.5, 0.25
    expected = (0.5 * log(0.5 / 0.25) + 0.5 * log(0.5 / 0.75)) / SEEN[seen]
    bodies = {
        "/v1/completions": {"prompt": EASY},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "the the the"}]},
    }
    with routed(dense, built, settings=Settings(shadow=1.0)) as client:
        for _ in range(3):
            client.post(path, json={**bodies[path], "stream": True}).raise_for_status()
        until(lambda: metric(client, metrics.MEASURED) == 3)
        assert metric(client, metrics.RECENT_LOSS) == pytest.approx(expected, rel=1e-6)
        assert metric(client, metrics.SHADOWS_FAILED) == 0
    assert (dense.answered(), built.answered()) == (0, 3)


def test_servers_without_log_probabilities_harm_no_answer(servers: tuple[OpenAIServer, OpenAIServer]) -> None:
    servers[0].status = 400
    with routed(*servers, settings=Settings(shadow=1.0)) as client:
        assert complete(client).headers["x-twofour-variant"] == "built"
        until(lambda: metric(client, metrics.SHADOWS_FAILED) == 1)


def test_the_metrics_page_names_every_metric(servers: tuple[OpenAIServer, OpenAIServer]) -> None:
    with routed(*servers) as client:
        complete(client)
        page = client.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain")
        for name in metrics.METRICS:
            assert f"# TYPE {name} " in page.text
        assert 'twofour_router_requests_total{variant="built",quality="auto"} 1' in page.text
        assert metric(client, metrics.TIMED) == 1
        assert 0 < metric(client, metrics.SECONDS) < 1


def test_another_builds_state_is_refused_at_the_start(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    state.write_text('{"build_id": "other", "threshold": 0.1, "measured": 3, "loss": 0.01}')
    with pytest.raises(UserError, match="is the state of build 'other'"):
        make_proxy(learned_router(), DOCS_LLAMA, Options("http://a", "http://b", state_file=state))


@pytest.mark.parametrize(("dense", "fragment"), [("localhost:8000", "is not a URL"), ("http://b/v1", "are both")])
def test_wrong_urls_are_quoted(dense: str, fragment: str) -> None:
    with pytest.raises(UserError, match=fragment):
        make_proxy(learned_router(), DOCS_LLAMA, Options(dense, "http://b"))
