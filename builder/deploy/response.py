"""Responses to Triton's clients. Runs inside Triton's Python backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from builder.deploy import request_schema, scoring
from builder.deploy.detokenizer import TextStream
from builder.engines.base import Engine, Token
from calibration.routing.controller import UnavailableError
from plugins.common.errors import UserError


class Reply:
    """The response to one request: sent token by token if the client streams, else when it is complete."""

    def __init__(
        self, ask: request_schema.ParsedRequest, sender: Any, text: TextStream, end_ids: frozenset[int], arrival: float
    ) -> None:
        self.id = ask.request.id
        self.ask = ask
        self.sender = sender
        self.count = 0
        self.ended = False
        self.ticket: str | None = None  # names the request for a router
        self.left = False  # the router's client left
        self._text = text
        self._end_ids = end_ids
        self._arrival = arrival
        self._first = 0.0
        self._last: Token | None = None
        self._error: Exception | None = None
        self._unsent_text = ask.echo
        self._unsent_ids: list[int] = []

    @property
    def complete(self) -> bool:
        """Whether the whole response was sent."""
        return self.ended and self._error is None

    def take(self, event: Token | Exception) -> None:
        """Adds a token, or the error that ends the response."""
        if isinstance(event, Exception):
            self._error, self.ended = event, True
            return
        self.count += 1
        self._first = self._first or event.time
        self._last, self.ended = event, event.last
        self._unsent_ids.append(event.token)
        self._unsent_text += self._text.push(event.token)

    def send(self) -> None:
        """Sends what was added since the last response, if due."""
        if self._error is not None:
            send_error(self.sender, self._error)
        elif self.ended or self.ask.stream:
            self._unsent_text += self._text.flush() if self.ended else ""
            outputs = [_strings("text_output", self._unsent_text), _integers("output_ids", np.int32, *self._unsent_ids)]
            outputs += self._summary() if self.ended else []
            flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if self.ended else 0
            self.sender.send(pb_utils.InferenceResponse(output_tensors=outputs), flags=flags)
            self._unsent_text, self._unsent_ids = "", []

    def totals(self) -> dict[str, int]:
        """The increments of the metrics for a finished response."""
        assert self._last is not None, "an answer has at least one token"
        return {
            "requests": 1,
            "input_tokens": len(self.ask.request.input_ids),
            "output_tokens": self.count,
            "time_to_first_token_us": int((self._first - self._arrival) * 1e6),
            "request_duration_us": int((self._last.time - self._arrival) * 1e6),
        }

    def _summary(self) -> list[Any]:
        assert self._last is not None, "an answer has at least one token"
        ended = self._last.token in self._end_ids and not self.ask.request.ignore_eos
        outputs = [
            _strings("finish_reason", "stop" if ended else "length"),
            _integers("num_input_tokens", np.int32, len(self.ask.request.input_ids)),
            _integers("num_output_tokens", np.int32, self.count),
        ]
        if self.ask.perf_metrics:
            moments = {"arrival": self._arrival, "first_token": self._first, "last_token": self._last.time}
            outputs += [_integers(f"{name}_time_ns", np.int64, int(time * 1e9)) for name, time in moments.items()]
        return outputs


class FullError(Exception):
    """The queue is full."""


class CancelledError(Exception):
    """The client disconnected."""


class CallError(Exception):
    """An error of another model that was called. `code`: Triton's; None: INTERNAL."""

    def __init__(self, message: str, code: Any = None) -> None:
        super().__init__(message)
        self.code = code


def send_error(sender: Any, error: Exception) -> None:
    codes = {
        UserError: "INVALID_ARG",
        FullError: "UNAVAILABLE",
        UnavailableError: "UNAVAILABLE",
        CancelledError: "CANCELLED",
    }
    name = next((name for kind, name in codes.items() if isinstance(error, kind)), "INTERNAL")
    code = getattr(error, "code", None) or getattr(pb_utils.TritonError, name)
    if code == pb_utils.TritonError.INTERNAL:
        pb_utils.Logger.log_error(f"{type(error).__name__}: {error}")
    triton_error = pb_utils.TritonError(str(error), code)
    sender.send(pb_utils.InferenceResponse(error=triton_error), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def send_text(sender: Any, text: str) -> None:
    """The whole response: one text."""
    response = pb_utils.InferenceResponse(output_tensors=[_strings("text_output", text)])
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def send_score(sender: Any, engine: Engine, input_ids: list[int], start: int) -> None:
    """The score of the tokens from `start` on, or the error that it raised."""
    try:
        text = scoring.score(engine, input_ids, start)
    except Exception as error:
        send_error(sender, error)
    else:
        send_text(sender, text)


def _strings(name: str, value: str) -> Any:
    return pb_utils.Tensor(name, np.array([value.encode("utf8")], dtype=object))


def _integers(name: str, dtype: type[np.signedinteger[Any]], *values: int) -> Any:
    return pb_utils.Tensor(name, np.array(values, dtype=dtype))
