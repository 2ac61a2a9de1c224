"""A Triton server at its limits: a full queue, clients that leave, models that cannot load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from builder.config import DeployConfig
from builder.deploy.repository import write_repository
from builder.deploy.server import Ports, Server
from plugins.common.errors import UserError
from tests.support.triton_server import BATCH, generate, grpc, metric, refusal, tensor
from tests.support.triton_server import build as build
from tests.support.triton_server import server as server


def test_the_caching_model_says_that_it_cannot_stream(server: Server) -> None:
    assert "deployed without streaming" in refusal(server, "cached", text_input="a", stream=True)


def test_a_full_queue_refuses(server: Server) -> None:
    def attempt(index: int) -> str:
        try:
            generate(server, input_ids=[40 + index], max_tokens=200, ignore_eos=True)
        except urllib.error.HTTPError as error:
            return str(json.load(error)["error"])
        return "answered"

    with ThreadPoolExecutor(BATCH + 4 + 6) as pool:
        answers = list(pool.map(attempt, range(BATCH + 4 + 6)))
    refused = [answer for answer in answers if answer != "answered"]
    assert len(answers) - len(refused) >= BATCH + 4
    assert refused
    assert all(fragment.endswith("are waiting or running: try again later") for fragment in refused)


def test_a_client_that_leaves_stops_its_request(server: Server) -> None:
    gone, made = metric(server, "twofour_cancelled_requests", "llm"), metric(server, "twofour_output_tokens", "llm")
    inputs = [
        tensor("input_ids", "INT32", 5, 6, 7),
        tensor("max_tokens", "INT32", 500),
        tensor("stream", "BOOL", True),
        tensor("ignore_eos", "BOOL", True),
    ]
    arrived = threading.Event()
    with grpc.InferenceServerClient(server.url("grpc")) as client:
        client.start_stream(lambda result, error: arrived.set())
        client.async_stream_infer("llm", inputs)
        assert arrived.wait(60)
        client.stop_stream(cancel_requests=True)
    deadline = time.monotonic() + 10
    while metric(server, "twofour_cancelled_requests", "llm") == gone:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert metric(server, "twofour_output_tokens", "llm") == made


def test_a_model_that_cannot_load_is_explained(build: Path, tmp_path: Path) -> None:
    write_repository(build / "engine", tmp_path / "triton", DeployConfig(engine_path="../../missing"))
    with (
        pytest.raises(UserError, match=r"stopped before it was ready: .*no engine at '.*missing'"),
        Server(tmp_path / "triton", Ports.free()),
    ):
        pass


def test_serve_says_where_and_leaves_nothing_behind(build: Path, tmp_path: Path) -> None:
    ports = Ports.free()
    write_repository(build / "engine", tmp_path / "triton", DeployConfig())
    code = "import sys; from pathlib import Path; from builder.deploy.server import Ports, serve; "
    code += f"serve(Path(sys.argv[1]), {ports!r})"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(tmp_path / "triton")],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell's background job starts
    )
    assert process.stdout is not None
    printed = [next(process.stdout) for _ in range(6)]
    assert f"http://127.0.0.1:{ports.http}" in printed[1]
    command = printed[4].partition("try  ")[2].strip()
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert "text_output" in json.loads(answer.stdout)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=45) == 0
    assert "stopping" in process.stdout.read()
    Ports.check(ports, "127.0.0.1")
