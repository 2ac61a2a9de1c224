"""A small OpenAI-compatible server on localhost, whose tokens, pauses and failures a test decides."""

from __future__ import annotations

import json
import math
import select
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class OpenAIServer:
    """Answers with the tokens "<name>0 <name>1 ...".

    bodies: what clients sent. gate: a token is sent for each release, where not None. status: of each answer.
    dies_after: tokens after which the connection breaks. probability: of the likeliest token, for log-probabilities.
    """

    name: str
    port: int = 0
    gate: threading.Semaphore | None = None
    status: int = 200
    dies_after: int | None = None
    probability: float = 0.5
    bodies: list[dict[str, Any]] = field(default_factory=list)
    cancelled: int = 0
    open_requests: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answered(self) -> int:
        """Requests of users: shadow runs ask for log-probabilities."""
        return sum("logprobs" not in body for body in self.bodies)

    @contextmanager
    def running(self) -> Iterator[OpenAIServer]:
        """The server listens within the block, on the same port each time."""
        http = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        http.daemon_threads = True
        self.port = http.server_address[1]
        thread = threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            http.shutdown()
            http.server_close()


def _handler(state: OpenAIServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._send({"data": [{"id": f"model-of-{state.name}"}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            state.bodies.append(body)
            state.open_requests += 1
            try:
                self._answer(body)
            except (ConnectionError, _LeftError):
                state.cancelled += 1
            finally:
                state.open_requests -= 1

        def _answer(self, body: dict[str, Any]) -> None:
            if state.status != 200:
                self._send({"error": {"message": f"{state.name} refuses"}}, state.status)
                return
            tokens = [f"{state.name}{index} " for index in range(body.get("max_tokens", 4))]
            if body.get("stream"):
                self.send_response(200)
                self.send_header("connection", "close")
                self.send_header("content-type", "text/event-stream")
                self.send_header("transfer-encoding", "chunked")  # so that a client sees where it breaks off
                self.end_headers()
            for index, token in enumerate(tokens):
                self._wait()
                if index == state.dies_after:
                    self.close_connection = True
                    return
                if body.get("stream"):
                    self._event(json.dumps({"choices": [{"text": token}]}))
            if body.get("stream"):
                self._event("[DONE]")
                self.wfile.write(b"0\r\n\r\n")
            else:
                choice: dict[str, Any] = {"text": "".join(tokens)}
                if "logprobs" in body:
                    choice["logprobs"] = self._logprobs(len(tokens), chat="top_logprobs" in body)
                self._send({"model": body.get("model"), "choices": [choice]})

        def _event(self, data: str) -> None:
            event = f"data: {data}\n\n"
            self.wfile.write(f"{len(event):x}\r\n{event}\r\n".encode())

        def _logprobs(self, count: int, chat: bool) -> dict[str, Any]:
            top = {"a": math.log(state.probability), "b": math.log(1 - state.probability)}
            if not chat:
                return {"tokens": ["a"] * count, "top_logprobs": [top] * count}
            listed = [{"token": token, "logprob": value} for token, value in top.items()]
            return {"content": [{"token": "a", "logprob": top["a"], "top_logprobs": listed}] * count}

        def _wait(self) -> None:
            """Until the test releases a token; raises where the client left."""
            while state.gate is not None and not state.gate.acquire(timeout=0.02):
                if select.select([self.connection], [], [], 0)[0]:
                    raise _LeftError

        def _send(self, value: Any, status: int = 200) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("connection", "close")  # so that a server that stops is gone
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler


class _LeftError(Exception):
    pass


def until(holds: Any, seconds: float = 10) -> None:
    """Waits until `holds()`."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it does not hold in time"
        time.sleep(0.01)
