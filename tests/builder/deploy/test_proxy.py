"""The router in front of two real HTTP servers on localhost: nothing is lost, answered twice or left running."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest

from builder.deploy.route import Options, make_proxy
from calibration.routing import metrics
from calibration.routing.controller import Settings
from plugins.common.errors import UserError
from tests.support.openai_server import OpenAIServer, until
from tests.support.routing import EASY, HARD, UNREADABLE, learned_router

httpx = pytest.importorskip("httpx", reason="needs the extra 'route'")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra 'route'")
pytest.importorskip("starlette", reason="needs the extra 'route'")

DOCS_LLAMA = Path(__file__).parents[3] / "examples" / "docs-llama"
MIXED = Settings(shadow=0.0)


@contextmanager
def routed(dense: OpenAIServer, built: OpenAIServer, **options: Any) -> Iterator[Any]:
    """A client of a proxy in front of the two servers."""
    chosen = replace(Options(dense.url, built.url, settings=MIXED), **options)
    proxy, service = make_proxy(learned_router(), DOCS_LLAMA, chosen)
    server = uvicorn.Server(uvicorn.Config(proxy.app(), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            until(lambda: len(client.get("/v1/models").json()["data"]) == 2)
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
        service.close()


@pytest.fixture
def servers() -> Iterator[tuple[OpenAIServer, OpenAIServer]]:
    with ExitStack() as stack:
        yield (
            stack.enter_context(OpenAIServer("dense").running()),
            stack.enter_context(OpenAIServer("built").running()),
        )


def test_the_command_serves_with_a_builds_router_and_keeps_its_state(
    servers: tuple[OpenAIServer, OpenAIServer], tmp_path: Path
) -> None:
    learned_router().save(tmp_path / "routing")
    (tmp_path / "checkpoint").symlink_to(DOCS_LLAMA)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", "from builder.cli.commands import main; main()", "route"]
    command += ["--dense", servers[0].url, "--built", servers[1].url + "/v1", "--router", str(tmp_path / "routing")]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--shadow", "1", "--state", str(tmp_path / "state.json")]
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            until(lambda: reachable(client), seconds=60)
            assert complete(client).headers["x-twofour-variant"] == "built"
            assert complete(client, HARD).headers["x-twofour-variant"] == "dense"
            until(lambda: metric(client, metrics.MEASURED) == 2)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(20) in (0, 130)
    state = json.loads((tmp_path / "state.json").read_text())
    assert (state["build_id"], state["measured"]) == ("this", 2)


def reachable(client: Any) -> bool:
    try:
        return bool(client.get("/health").status_code == 200)
    except httpx.TransportError:
        return False


def complete(client: Any, prompt: Any = EASY, **fields: Any) -> Any:
    return client.post("/v1/completions", json={"model": "any", "prompt": prompt, **fields})


def metric(client: Any, name: str) -> float:
    page = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in page if line.startswith((f"{name} ", f"{name}{{")))


@pytest.mark.parametrize(
    ("fields", "answers"),
    [
        ({"prompt": EASY}, "built"),
        ({"prompt": HARD}, "dense"),
        ({"prompt": UNREADABLE}, "dense"),
        ({"prompt": [EASY, HARD]}, "dense"),
        ({"prompt": EASY, "quality": "high"}, "dense"),
        ({"prompt": HARD, "quality": "fast"}, "built"),
        ({"prompt": HARD, "variant": "built"}, "built"),
    ],
)
def test_each_request_goes_where_the_router_sends_it(
    servers: tuple[OpenAIServer, OpenAIServer], fields: dict[str, Any], answers: str
) -> None:
    with routed(*servers) as client:
        response = complete(client, **fields)
        assert response.headers["x-twofour-variant"] == answers
        assert response.json()["choices"][0]["text"] == "".join(f"{answers}{index} " for index in range(4))
        until(lambda: complete(client, **fields).json()["model"] == f"model-of-{answers}")
    sent = [body for server in servers for body in server.bodies]
    assert not any({"quality", "variant"} & body.keys() for body in sent)


def test_headers_and_chats_are_routed_too(servers: tuple[OpenAIServer, OpenAIServer]) -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    with routed(*servers) as client:
        high = client.post("/v1/chat/completions", json=chat, headers={"x-twofour-quality": "high"})
        assert high.headers["x-twofour-variant"] == "dense"
        forced = client.post("/v1/chat/completions", json=chat, headers={"x-twofour-variant": "built"})
        assert forced.headers["x-twofour-variant"] == "built"
        image = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}
        assert client.post("/v1/chat/completions", json=image).headers["x-twofour-variant"] == "dense"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ""}, "'prompt' is empty: send a prompt"),
        ({"prompt": []}, "'prompt' is empty"),
        ({"prompt": EASY, "quality": "best"}, "'quality' is 'best': send one of high, auto, fast"),
        ({"prompt": EASY, "quality": 5}, "'quality' is 5"),
        ({"prompt": EASY, "variant": "tiny"}, "'variant' is 'tiny': send one of dense, built"),
    ],
)
def test_bad_input_is_quoted_and_reaches_no_server(
    servers: tuple[OpenAIServer, OpenAIServer], fields: dict[str, Any], words: str
) -> None:
    with routed(*servers) as client:
        refused = complete(client, **fields)
        assert refused.status_code == 400
        assert words in refused.json()["error"]["message"]
        for content in (b"{", b"[]", b"\xff"):
            assert client.post("/v1/completions", content=content).status_code == 400
        assert client.post("/v1/chat/completions", json={}).json()["error"]["message"] == "no 'messages': send a prompt"
    assert not [body for server in servers for body in server.bodies]


def test_a_stream_passes_token_by_token(servers: tuple[OpenAIServer, OpenAIServer]) -> None:
    gate = servers[1].gate = threading.Semaphore(0)
    with routed(*servers) as client, client.stream("POST", "/v1/completions", json={
        "prompt": EASY, "stream": True, "max_tokens": 3}) as response:  # fmt: skip
        gate.release()  # the head of a response comes with its first token
        lines = (line for line in response.iter_lines() if line)
        for index in range(3):
            assert json.loads(next(lines).removeprefix("data: "))["choices"][0]["text"] == f"built{index} "
            gate.release()  # only now can the server send the next one
        assert next(lines) == "data: [DONE]"
    assert servers[1].answered() == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_request(servers: tuple[OpenAIServer, OpenAIServer], stream: bool) -> None:
    servers[1].gate = threading.Semaphore(2)
    with routed(*servers) as client:
        body = {"prompt": EASY, "stream": stream, "max_tokens": 1000}
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as response:
                assert next(response.iter_bytes())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.3)
        until(lambda: servers[1].cancelled == 1)
        assert servers[1].open_requests == 0
        servers[1].gate = None
        assert complete(client).status_code == 200


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


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_shadow_runs_measure_the_divergence_after_the_answer(
    servers: tuple[OpenAIServer, OpenAIServer], path: str
) -> None:
    dense, built = servers
    dense.probability, built.probability = 0.5, 0.25
    expected = 0.5 * log(0.5 / 0.25) + 0.5 * log(0.5 / 0.75)
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


@pytest.mark.parametrize(("dense", "words"), [("localhost:8000", "is no URL"), ("http://b/v1", "are both")])
def test_wrong_urls_are_quoted(dense: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_proxy(learned_router(), DOCS_LLAMA, Options(dense, "http://b"))
