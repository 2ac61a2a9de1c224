"""The model that Triton's Python backend runs: a deployed `model.py` is this class with an engine's `load`.

Three threads: Triton's, which reads requests; the engine's (`EngineLoop`), which computes; and one that sends the
answers, so that neither waits for a client.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import triton_python_backend_utils as pb_utils

from builder.deploy import request_schema, scoring
from builder.deploy.detokenizer import TextStream
from builder.deploy.engine_thread import EngineLoop
from builder.deploy.response import CancelledError, FullError, Reply, send_error, send_score, send_text
from builder.engines.base import Engine, Token
from plugins.common.json_files import read_json

_CANCELLATION_PERIOD = 0.02  # seconds between two checks for disconnected clients


class EngineModel:
    """Serves the engine at the `engine_dir` of config.pbtxt's parameters."""

    @staticmethod
    def load(engine_dir: Path) -> Engine:
        """Opens an engine directory; defined by the deployed model."""
        raise NotImplementedError

    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        written, running = parameters["twofour_version"], version("twofour")
        if written != running:
            pb_utils.Logger.log_warn(f"written by twofour {written}, served by {running}: deploy it again")
        engine_dir = (Path(args["model_repository"]) / parameters["engine_dir"]).resolve()
        if not (engine_dir / "config.json").is_file():
            raise pb_utils.TritonModelException(f"no engine at '{engine_dir}': move it there or deploy the build again")
        from calibration.data.tokenizer import load_tokenizer

        self._tokenizer = load_tokenizer(engine_dir)
        self._limits = _limits(engine_dir, parameters, config)
        self._capacity = _capacity(engine_dir, parameters)
        self._counters = _Counters(args["model_name"])
        self._open: dict[str, Reply] = {}
        self._outbox: queue.SimpleQueue[tuple[Reply, Token | Exception] | None] = queue.SimpleQueue()
        self._loop = EngineLoop(self.load(engine_dir))
        self._sender = threading.Thread(target=self._send, name="sender", daemon=True)
        self._sender.start()
        self._count = 0

    def execute(self, requests: list[Any]) -> None:
        """Queues the requests; `_send` returns their responses."""
        for request in requests:
            self._count += 1
            sender = request.get_response_sender()
            try:
                self._accept(request, sender, str(self._count))
            except Exception as error:
                send_error(sender, error)

    def finalize(self) -> None:
        self._loop.stop()
        self._outbox.put(None)
        self._sender.join()

    def _accept(self, request: Any, sender: Any, request_id: str) -> None:
        arrival = time.perf_counter()
        if self._capacity and len(self._open) >= self._capacity:
            raise FullError(f"{len(self._open)} requests are waiting or running: try again later")
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        parameters = json.loads(request.parameters())
        ticket = parameters.pop(scoring.TICKET, None)
        if scoring.CANCEL in parameters:
            self._cancel_ticket(parameters[scoring.CANCEL])
            send_text(sender, "")
            return
        start = parameters.pop(scoring.SCORE_FROM, None)
        values = request_schema.read(tensors, parameters)
        if start is not None:
            self._loop.run(lambda engine: send_score(sender, engine, values["input_ids"], int(start)))
            return
        ask = request_schema.understand(values, request_id, self._limits, self._encode, self._decode)
        reply = Reply(ask, sender, TextStream(self._decode, ask.request.input_ids), self._limits.end_ids, arrival)
        reply.ticket = ticket
        self._open[request_id] = reply
        self._loop.submit(ask.request, lambda event: self._outbox.put((reply, event)))

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        from calibration.data.encoding import encode_text

        return encode_text(self._tokenizer, text, add_special_tokens)

    def _decode(self, ids: Any) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _send(self) -> None:
        """The sending thread: sends what the engine produced, and checks for disconnected clients in between.

        A client gets its tokens one by one, or several together where sending falls behind the engine.
        """
        look = time.monotonic()
        while (produced := self._produced()) is not None:
            for reply, events in produced.items():
                if reply.id in self._open:  # else its client disconnected
                    self._answer(reply, events)
            if time.monotonic() - look >= _CANCELLATION_PERIOD:
                self._drop_cancelled()
                look = time.monotonic()

    def _produced(self) -> dict[Reply, list[Token | Exception]] | None:
        """Queued events by reply; empty after a timeout, None at the end."""
        events: dict[Reply, list[Token | Exception]] = {}
        with contextlib.suppress(queue.Empty):
            item = self._outbox.get(timeout=_CANCELLATION_PERIOD)
            while item is not None:
                events.setdefault(item[0], []).append(item[1])
                item = self._outbox.get_nowait()
            return None
        return events

    def _answer(self, reply: Reply, events: list[Token | Exception]) -> None:
        try:
            for event in events:
                reply.take(event)
            reply.send()
            if reply.complete:
                for name, value in reply.totals().items():
                    self._counters.add(name, value)
        except Exception as error:  # this response is lost; the others must still be sent
            pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
            self._loop.cancel(reply.id)
            reply.ended = True
        if reply.ended:
            del self._open[reply.id]

    def _cancel_ticket(self, ticket: str) -> None:
        for reply in list(self._open.values()):
            reply.left = reply.left or reply.ticket == ticket

    def _drop_cancelled(self) -> None:
        for reply in list(self._open.values()):
            if reply.left or reply.sender.is_cancelled():
                del self._open[reply.id]
                self._loop.cancel(reply.id)
                self._counters.add("cancelled_requests", 1)
                send_error(reply.sender, CancelledError("the client cancelled the request"))


def _limits(engine_dir: Path, parameters: dict[str, str], config: dict[str, Any]) -> request_schema.Limits:
    """Limits of requests, from the model's configuration files."""
    model = read_json(engine_dir / "config.json")
    generation = engine_dir / "generation_config.json"
    end = read_json(generation, {}).get("eos_token_id")
    end = model.get("eos_token_id") if end is None else end
    return request_schema.Limits(
        vocabulary=model["vocab_size"],
        end_ids=frozenset([] if end is None else end if isinstance(end, list) else [end]),
        max_tokens=int(parameters["max_tokens"]),
        streaming=bool(config.get("model_transaction_policy", {}).get("decoupled", False)),
    )


def _capacity(engine_dir: Path, parameters: dict[str, str]) -> int:
    """The most open requests: the running batch and its queue. 0: no limit."""
    waiting = int(parameters["max_queue_size"])
    engine = read_json(engine_dir / "engine.json")
    return int(engine["max_batch_size"]) + waiting if waiting else 0


class _Counters:
    """Metrics in addition to Triton's own, whose durations end when a request is accepted."""

    _WORDS: ClassVar = {
        "twofour_requests": "Requests answered",
        "twofour_input_tokens": "Prompt tokens of the requests answered",
        "twofour_output_tokens": "Tokens generated for the requests answered",
        "twofour_time_to_first_token_us": "Sum of the times from a request's arrival to its first token",
        "twofour_request_duration_us": "Sum of the times from a request's arrival to its last token",
        "twofour_cancelled_requests": "Requests whose client went away",
    }

    def __init__(self, model: str) -> None:
        # Triton drops a metric whose family is collected, so the families are kept too.
        self._families = {
            name: pb_utils.MetricFamily(name=name, description=help_text, kind=pb_utils.MetricFamily.COUNTER)
            for name, help_text in self._WORDS.items()
        }
        self._metrics = {name: family.Metric(labels={"model": model}) for name, family in self._families.items()}

    def add(self, name: str, value: int) -> None:
        self._metrics[f"twofour_{name}"].increment(value)
