"""The router in front of two real HTTP servers on localhost: nothing is lost, answered twice or left running."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from calibration.routing import metrics
from tests.support.openai_server import OpenAIServer, until
from tests.support.route_proxy import DOCS_LLAMA, complete, httpx, metric, routed
from tests.support.route_proxy import servers as servers
from tests.support.routing import EASY, HARD, UNREADABLE, learned_router

pytest.importorskip("starlette", reason="needs the extra 'route'")


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
    ("fields", "fragment"),
    [
        ({"prompt": ""}, "'prompt' is empty: send a prompt"),
        ({"prompt": []}, "'prompt' is empty"),
        ({"prompt": EASY, "quality": "best"}, "'quality' is 'best': send one of high, auto, fast"),
        ({"prompt": EASY, "quality": 5}, "'quality' is 5"),
        ({"prompt": EASY, "variant": "tiny"}, "'variant' is 'tiny': send one of dense, built"),
    ],
)
def test_bad_input_is_quoted_and_reaches_no_server(
    servers: tuple[OpenAIServer, OpenAIServer], fields: dict[str, Any], fragment: str
) -> None:
    with routed(*servers) as client:
        refused = complete(client, **fields)
        assert refused.status_code == 400
        assert fragment in refused.json()["error"]["message"]
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
