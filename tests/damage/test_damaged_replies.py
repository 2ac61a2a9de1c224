"""Servers that answer with anything: a record with tokens or an error of one line, never an exception."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving.drivers import openai, triton
from benchmarks.serving.drivers.http import Endpoint
from benchmarks.serving.workload import BenchRequest
from plugins.common.errors import UserError
from tests.support.damage import altered, damaged

REQUEST = BenchRequest("0", (1, 2), 3)
COMPLETION = [
    {"choices": [{"index": 0, "text": "", "finish_reason": None}], "usage": None},
    *({"choices": [{"index": 0, "text": f" t{n}", "finish_reason": None}], "usage": None} for n in range(3)),
    {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]},
    {"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}},
]
GENERATED = [
    *({"model_name": "llm", "output_ids": [n], "text_output": "x"} for n in range(2)),
    {"model_name": "llm", "output_ids": 2, "text_output": "x", "num_input_tokens": 2, "num_output_tokens": 3},
]
DIALECTS: dict[str, tuple[Any, list[Any]]] = {"openai": (openai, COMPLETION), "triton": (triton, GENERATED)}


def stream(events: list[Any]) -> bytes:
    return b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events) + b"data: [DONE]\n\n"


class Server(ThreadingHTTPServer):
    """Answers every request with `content`."""

    daemon_threads = True
    content = b""
    status = 200

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.do_GET()

    def do_GET(self) -> None:
        self.send_response(self.server.status)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_damaged_stream_is_a_record(dialect: str, server: Server) -> None:
    driver, events = DIALECTS[dialect]

    @given(st.data())
    def check(data: st.DataObject) -> None:
        if data.draw(st.booleans()):
            server.content = data.draw(damaged(stream(events)))
        else:
            server.content = stream(data.draw(altered(events)))
        (record,) = driver.run(Endpoint(server.url, "m", request_s=5, gap_s=5), [REQUEST], 1)
        if record.error is None:
            assert record.output_tokens == REQUEST.max_new_tokens
            assert record.start < record.token_times[0] <= record.end
        else:
            assert "\n" not in record.error

    server.content = stream(events)
    (whole,) = driver.run(Endpoint(server.url, "m"), [REQUEST], 1)
    assert (whole.error, whole.output_tokens, len(whole.token_times)) == (None, 3, 3)
    check()


def test_a_damaged_list_of_models_is_refused(server: Server) -> None:
    @given(damaged(json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]}).encode()))
    def check(content: bytes) -> None:
        server.content = content
        try:
            openai.run(Endpoint(server.url), [], 1)
        except UserError as error:
            message = str(error)
        else:
            return
        assert server.url in message
        assert "\n" not in message

    check()
