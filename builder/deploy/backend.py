"""The model that Triton's Python backend runs: a deployed `model.py` is this class with an engine's `load`.

Three threads: Triton's, which reads requests; the engine's (`EngineLoop`), which computes; and one that sends the
answers, so that neither waits for a client.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import triton_python_backend_utils as pb_utils

from builder.deploy import protocol
from builder.deploy.loop import EngineLoop
from builder.deploy.text import TextStream
from builder.engines.base import Engine, Token
from plugins.errors import UserError

_CANCELLATION_PERIOD = 0.1  # seconds between two looks at which clients have gone


class EngineModel:
    """Serves the engine at the `engine_dir` of config.pbtxt's parameters."""

    @staticmethod
    def load(engine_dir: Path) -> Engine:
        """Opens an engine directory; the deployed model says how."""
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
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(engine_dir)
        self._limits = _limits(engine_dir, parameters, config)
        self._capacity = _capacity(engine_dir, parameters)
        self._counters = _Counters(args["model_name"])
        self._open: dict[str, _Reply] = {}
        self._outbox: queue.SimpleQueue[tuple[_Reply, Token | Exception] | None] = queue.SimpleQueue()
        self._loop = EngineLoop(self.load(engine_dir))
        self._sender = threading.Thread(target=self._send, name="sender", daemon=True)
        self._sender.start()
        self._count = 0

    def execute(self, requests: list[Any]) -> None:
        """Takes the requests in; their answers leave through `_send`."""
        for request in requests:
            self._count += 1
            sender = request.get_response_sender()
            try:
                self._accept(request, sender, str(self._count))
            except Exception as error:
                _send_error(sender, error)

    def finalize(self) -> None:
        self._loop.stop()
        self._outbox.put(None)
        self._sender.join()

    def _accept(self, request: Any, sender: Any, request_id: str) -> None:
        arrival = time.perf_counter()
        if self._capacity and len(self._open) >= self._capacity:
            raise _FullError(f"{len(self._open)} requests are waiting or running: try again later")
        tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        values = protocol.read(tensors, json.loads(request.parameters()))
        ask = protocol.understand(values, request_id, self._limits, self._tokenizer.encode, self._decode)
        reply = _Reply(ask, sender, TextStream(self._decode, ask.request.input_ids), self._limits.end_ids, arrival)
        self._open[request_id] = reply
        self._loop.submit(ask.request, lambda event: self._outbox.put((reply, event)))

    def _decode(self, ids: Any) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _send(self) -> None:
        """The sending thread: answers what the engine produced, and in between looks for clients that have gone."""
        look = time.monotonic()
        while True:
            try:
                event = self._outbox.get(timeout=_CANCELLATION_PERIOD)
                if event is None:
                    return
                self._answer(*event)
            except queue.Empty:
                pass
            except Exception as error:  # one answer went wrong; the others still wait for theirs
                pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
            if time.monotonic() - look >= _CANCELLATION_PERIOD:
                self._drop_cancelled()
                look = time.monotonic()

    def _answer(self, reply: _Reply, event: Token | Exception) -> None:
        if reply.ask.request.id not in self._open:
            return  # cancelled while the token was on its way
        if isinstance(event, Token) and not event.last:
            reply.take(event)
            return
        del self._open[reply.ask.request.id]
        if isinstance(event, Exception):
            _send_error(reply.sender, event)
            return
        reply.take(event)
        self._counters.add("input_tokens", len(reply.ask.request.input_ids))
        self._counters.add("output_tokens", reply.count)

    def _drop_cancelled(self) -> None:
        for request_id, reply in list(self._open.items()):
            if reply.sender.is_cancelled():
                del self._open[request_id]
                self._loop.cancel(request_id)
                self._counters.add("cancelled_requests", 1)
                _send_error(reply.sender, _CancelledError("the client cancelled the request"))


class _Reply:
    """The answer to one request: sent token by token where the client streams, else when it is whole."""

    def __init__(
        self, ask: protocol.Ask, sender: Any, text: TextStream, end_ids: frozenset[int], arrival: float
    ) -> None:
        self.ask = ask
        self.sender = sender
        self.count = 0
        self._text = text
        self._end_ids = end_ids
        self._arrival = arrival
        self._first = 0.0
        self._unsent_text = ask.echo
        self._unsent_ids: list[int] = []

    def take(self, token: Token) -> None:
        self.count += 1
        self._first = self._first or token.time
        self._unsent_ids.append(token.token)
        self._unsent_text += self._text.push(token.token)
        if token.last:
            self._unsent_text += self._text.flush()
        if not (token.last or self.ask.stream):
            return
        outputs = [_strings("text_output", self._unsent_text), _integers("output_ids", np.int32, *self._unsent_ids)]
        if token.last:
            outputs += self._summary(token)
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if token.last else 0
        self.sender.send(pb_utils.InferenceResponse(output_tensors=outputs), flags=flags)
        self._unsent_text, self._unsent_ids = "", []

    def _summary(self, token: Token) -> list[Any]:
        ended = token.token in self._end_ids and not self.ask.request.ignore_eos
        outputs = [
            _strings("finish_reason", "stop" if ended else "length"),
            _integers("num_input_tokens", np.int32, len(self.ask.request.input_ids)),
            _integers("num_output_tokens", np.int32, self.count),
        ]
        if self.ask.perf_metrics:
            moments = {"arrival": self._arrival, "first_token": self._first, "last_token": token.time}
            outputs += [_integers(f"{name}_time_ns", np.int64, int(time * 1e9)) for name, time in moments.items()]
        return outputs


class _FullError(Exception):
    """No room for another request."""


class _CancelledError(Exception):
    """The client has gone."""


def _send_error(sender: Any, error: Exception) -> None:
    codes = {UserError: "INVALID_ARG", _FullError: "UNAVAILABLE", _CancelledError: "CANCELLED"}
    code = next((name for kind, name in codes.items() if isinstance(error, kind)), "INTERNAL")
    if code == "INTERNAL":
        pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
    triton_error = pb_utils.TritonError(str(error), getattr(pb_utils.TritonError, code))
    sender.send(pb_utils.InferenceResponse(error=triton_error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _strings(name: str, value: str) -> Any:
    return pb_utils.Tensor(name, np.array([value.encode("utf8")], dtype=object))


def _integers(name: str, dtype: type[np.signedinteger[Any]], *values: int) -> Any:
    return pb_utils.Tensor(name, np.array(values, dtype=dtype))


def _limits(engine_dir: Path, parameters: dict[str, str], config: dict[str, Any]) -> protocol.Limits:
    """What requests may ask, from the model's own configuration files."""
    model = json.loads((engine_dir / "config.json").read_text(encoding="utf8"))
    generation = engine_dir / "generation_config.json"
    end = json.loads(generation.read_text(encoding="utf8")).get("eos_token_id") if generation.is_file() else None
    end = model.get("eos_token_id") if end is None else end
    return protocol.Limits(
        vocabulary=model["vocab_size"],
        end_ids=frozenset([] if end is None else end if isinstance(end, list) else [end]),
        max_tokens=int(parameters["max_tokens"]),
        streaming=bool(config.get("model_transaction_policy", {}).get("decoupled", False)),
    )


def _capacity(engine_dir: Path, parameters: dict[str, str]) -> int:
    """How many requests may be open at once: the running batch and the queue behind it. 0: no limit."""
    waiting = int(parameters["max_queue_size"])
    engine = json.loads((engine_dir / "engine.json").read_text(encoding="utf8"))
    return int(engine["max_batch_size"]) + waiting if waiting else 0


class _Counters:
    """What the server adds to Triton's own metrics."""

    _WORDS: ClassVar = {
        "twofour_input_tokens": "Prompt tokens of the requests answered",
        "twofour_output_tokens": "Tokens generated for the requests answered",
        "twofour_cancelled_requests": "Requests whose client went away",
    }

    def __init__(self, model: str) -> None:
        # Triton drops a metric whose family is collected, so the families are kept too.
        self._families = {
            name: pb_utils.MetricFamily(name=name, description=words, kind=pb_utils.MetricFamily.COUNTER)
            for name, words in self._WORDS.items()
        }
        self._metrics = {name: family.Metric(labels={"model": model}) for name, family in self._families.items()}

    def add(self, name: str, value: int) -> None:
        self._metrics[f"twofour_{name}"].increment(value)
