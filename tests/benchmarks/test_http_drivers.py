"""Drivers of servers: streams are timed as they come, and every way in which a server fails is recorded."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from benchmarks.serving import request_metrics
from benchmarks.serving.drivers import openai, triton
from benchmarks.serving.drivers.http import Endpoint
from benchmarks.serving.workload import BenchRequest
from plugins.common.errors import UserError
from tests.support.bench_requests import ask

Script = Callable[["Handler", dict[str, Any]], None]


class Handler(BaseHTTPRequestHandler):
    """Runs the server's script for each POST, and counts how many it serves at once."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.enter(self.path, body)
        try:
            self.server.script(self, body)
        except OSError:
            pass  # the client left, as some tests want
        finally:
            self.server.leave()

    def do_GET(self) -> None:
        self.begin("application/json")
        self.wfile.write(json.dumps({"data": [{"id": name} for name in self.server.models]}).encode())

    def begin(self, kind: str = "text/event-stream", status: int = 200) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("connection", "close")
        self.end_headers()

    def send(self, event: dict[str, Any] | str) -> None:
        text = event if isinstance(event, str) else json.dumps(event)
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.lock = script, threading.Lock()
        self.now, self.most_at_once = 0, 0
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.models = ["the-model"]

    def enter(self, path: str, body: dict[str, Any]) -> None:
        with self.lock:
            self.asked.append((path, body))
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)

    def leave(self) -> None:
        with self.lock:
            self.now -= 1

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Server]]:
    servers: list[Server] = []

    def start(script: Script) -> Server:
        server = Server(script)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


GAP = 0.02


def completions(handler: Handler, body: dict[str, Any]) -> None:
    """What an OpenAI-compatible server sends, a token every GAP seconds."""
    handler.begin()
    for index in range(body["max_tokens"]):
        time.sleep(GAP)
        handler.send({"choices": [{"text": f"t{index}", "finish_reason": None}]})
    handler.send({"choices": [{"text": "", "finish_reason": "length"}]})
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
    handler.send({"choices": [], "usage": usage})
    handler.send("[DONE]")


def test_openai_streams_are_timed_token_by_token(serve: Callable[[Script], Server]) -> None:
    server = serve(completions)
    record = openai.run(Endpoint(server.url, "m"), ask(requests=4)[:1], 1)[0]
    assert record.error is None
    assert (record.input_tokens, record.output_tokens, len(record.token_times)) == (4, 5, 5)
    latency = request_metrics.inter_token_latency(record)
    assert latency is not None
    assert latency >= GAP * 1e3 * 0.9
    path, body = server.asked[0]
    assert path == "/v1/completions"
    assert body["prompt"] == list(ask(requests=4)[0].input_ids)
    assert (body["ignore_eos"], body["stream"], body["temperature"]) == (True, True, 0.0)


def test_openai_keeps_to_the_concurrency(serve: Callable[[Script], Server]) -> None:
    server = serve(completions)
    records = openai.run(Endpoint(server.url, "m"), ask(), 3)
    assert server.most_at_once == 3
    assert [record.error for record in records] == [None] * 6
    assert [record.id for record in records] == [request.id for request in ask()]


def test_tokens_are_counted_by_the_servers_usage_where_chunks_hold_several(serve: Callable[[Script], Server]) -> None:
    def two_chunks(handler: Handler, body: dict[str, Any]) -> None:
        handler.begin()
        handler.send({"choices": [{"text": "three tokens here", "finish_reason": None}]})
        handler.send({"choices": [{"text": "and two", "finish_reason": "length"}], "usage": {"completion_tokens": 5}})
        handler.send("[DONE]")

    record = openai.run(Endpoint(serve(two_chunks).url, "m"), ask(requests=4)[:1], 1)[0]
    assert (record.error, record.output_tokens, len(record.token_times)) == (None, 5, 2)


def fail_plainly(handler: Handler, body: dict[str, Any]) -> None:
    handler.begin("application/json", 503)
    handler.wfile.write(b'{"error": {"message": "model is\\nloading", "code": 503}}')


def fail_in_a_200(handler: Handler, body: dict[str, Any]) -> None:
    handler.begin("application/json")
    handler.wfile.write(b'{"error": {"message": "prompt too long"}}\n')


def fail_within_the_stream(handler: Handler, body: dict[str, Any]) -> None:
    handler.begin()
    handler.send({"choices": [{"text": "a", "finish_reason": None}]})
    handler.send({"object": "error", "message": "out of memory"})


def end_early(handler: Handler, body: dict[str, Any]) -> None:
    handler.begin()
    handler.send({"choices": [{"text": "a", "finish_reason": None}]})
    handler.send({"choices": [{"text": "b", "finish_reason": "stop"}]})
    handler.send("[DONE]")


def hang_up(handler: Handler, body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("content-length", "1000000")
    handler.end_headers()
    handler.send({"choices": [{"text": "a", "finish_reason": None}]})
    handler.close_connection = True


def send_nothing(handler: Handler, body: dict[str, Any]) -> None:
    handler.begin()


def send_html(handler: Handler, body: dict[str, Any]) -> None:
    handler.begin()
    handler.send("<html>")


def stall(handler: Handler, body: dict[str, Any]) -> None:
    handler.begin()
    handler.send({"choices": [{"text": "a", "finish_reason": None}]})
    time.sleep(1.0)


def drip(handler: Handler, body: dict[str, Any]) -> None:
    handler.begin()
    for _ in range(30):
        handler.send({"choices": [{"text": "a", "finish_reason": None}]})
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("script", "fragment"),
    [
        (fail_plainly, "HTTP 503: model is loading"),
        (fail_in_a_200, "HTTP 200 with no stream: prompt too long"),
        (fail_within_the_stream, "HTTP 200 with an error: out of memory"),
        (end_early, "ended after 2 of 5 tokens"),
        (hang_up, "peer closed connection"),
        (send_nothing, "HTTP 200 with an empty stream"),
        (send_html, "not JSON in the stream: <html>"),
        (stall, "silent for 0.3 s"),
        (drip, "not done after 0.6 s"),
    ],
)
def test_the_message_of_a_server_that_fails_is_recorded(
    serve: Callable[[Script], Server], script: Script, fragment: str
) -> None:
    patience = {"request_s": 0.6, "gap_s": 0.3} if script in (stall, drip) else {"request_s": 20.0, "gap_s": 10.0}
    endpoint = Endpoint(serve(script).url, "m", **patience)
    record = openai.run(endpoint, ask(requests=4)[:1], 1)[0]
    assert record.error is not None
    assert fragment in record.error
    assert "\n" not in record.error


def test_no_server_at_all_is_recorded(serve: Callable[[Script], Server]) -> None:
    server = serve(completions)
    server.shutdown()
    server.server_close()
    record = openai.run(Endpoint(server.url, "m"), ask(requests=4)[:1], 1)[0]
    assert record.error
    assert record.token_times == ()


def test_the_model_is_the_one_that_the_server_serves(serve: Callable[[Script], Server]) -> None:
    server = serve(completions)
    assert openai.run(Endpoint(server.url), ask(requests=4)[:1], 1)[0].error is None
    assert server.asked[0][1]["model"] == "the-model"


@pytest.mark.parametrize("models", [[], ["a", "b"]])
def test_a_server_of_several_models_or_none_needs_a_name(serve: Callable[[Script], Server], models: list[str]) -> None:
    server = serve(completions)
    server.models = models
    with pytest.raises(UserError, match=f"serves {len(models)} models"):
        openai.run(Endpoint(server.url), ask(requests=4), 1)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense", "http://[bad"])
def test_an_address_where_no_server_is_is_quoted(url: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"'{url}'")):
        openai.run(Endpoint(url), ask(requests=4), 1)


def test_one_failure_leaves_the_other_requests_alone(serve: Callable[[Script], Server]) -> None:
    turns = iter(range(100))

    def every_third(handler: Handler, body: dict[str, Any]) -> None:
        (fail_plainly if next(turns) % 3 == 0 else completions)(handler, body)

    records = openai.run(Endpoint(serve(every_third).url, "m"), ask(), 1)
    assert [record.error is None for record in records] == [False, True, True, False, True, True]


def test_poisson_requests_are_sent_when_due(serve: Callable[[Script], Server]) -> None:
    requests = [BenchRequest(str(index), (1,), 1, due=due) for index, due in enumerate((0.0, 0.15, 0.3))]
    records = openai.run(Endpoint(serve(completions).url, "m"), requests, 3)
    starts = [record.start - records[0].start for record in records]
    assert starts == pytest.approx([0.0, 0.15, 0.3], abs=0.05)


def test_triton_reads_generate_stream(serve: Callable[[Script], Server]) -> None:
    def generate_stream(handler: Handler, body: dict[str, Any]) -> None:
        handler.begin()
        for index in range(body["max_tokens"]):
            last = {"num_output_tokens": body["max_tokens"], "num_input_tokens": len(body["input_ids"])}
            final = index == body["max_tokens"] - 1
            handler.send({"model_name": "llm", "output_ids": index, "text_output": "x", **(last if final else {})})

    server = serve(generate_stream)
    record = triton.run(Endpoint(server.url, "llm"), ask(requests=4)[:1], 1)[0]
    assert (record.error, record.input_tokens, record.output_tokens) == (None, 4, 5)
    path, body = server.asked[0]
    assert path == "/v2/models/llm/generate_stream"
    assert (body["stream"], body["ignore_eos"]) == (True, True)


def test_triton_errors_are_recorded(serve: Callable[[Script], Server]) -> None:
    def refuse(handler: Handler, body: dict[str, Any]) -> None:
        handler.begin()
        handler.send({"error": "'max_tokens' is 0: it must be at least 1"})

    record = triton.run(Endpoint(serve(refuse).url, "llm"), ask(requests=4)[:1], 1)[0]
    assert record.error == "HTTP 200 with an error: 'max_tokens' is 0: it must be at least 1"
