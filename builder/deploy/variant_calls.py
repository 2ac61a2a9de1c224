"""Calls from a router to the models behind it, inside one Triton server. Runs inside Triton's Python backend."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from builder.deploy import scoring
from builder.deploy.response import CallError
from calibration.routing.divergence import LogProbabilities

_OUTPUTS = ["text_output", "output_ids", "finish_reason", "num_input_tokens", "num_output_tokens"]
_TIMES = ["arrival_time_ns", "first_token_time_ns", "last_token_time_ns"]

_PROBE = 0.2  # seconds between two probes
_STALE = 5.0  # seconds without a probe's answer, after which a model counts as down
_KEPT = 5.0  # seconds from a call's end to the release of its responses


class Variant:
    """One model behind the router. `capacity`: requests that run or wait in it; beyond, it is full.

    Triton never answers a request whose model's process was killed, so each model is probed: a request that runs in one
    that is down ends with CallError.
    """

    def __init__(self, name: str, model: str, capacity: int) -> None:
        self.name, self.model, self.capacity = name, model, capacity
        self.in_flight = 0
        self._lock = threading.Lock()
        self._answers_probes = True
        self._answered = time.monotonic()
        self._ended: deque[tuple[float, Any]] = deque()

    def watch(self) -> None:
        """Starts to probe the model."""
        self._answered = time.monotonic()
        threading.Thread(target=self._probe, name=f"probe {self.name}", daemon=True).start()

    @property
    def full(self) -> bool:
        return self.in_flight >= self.capacity

    @property
    def load(self) -> float:
        """The busy share, from 0 to 1."""
        return min(self.in_flight / self.capacity, 1.0)

    @property
    def up(self) -> bool:
        """Whether the model is loaded and its process runs."""
        return self._answers_probes and time.monotonic() - self._answered < _STALE

    def generate(self, tensors: Sequence[Any], ticket: str) -> Iterator[Any]:
        """The responses to the client's tensors, as they come. Raises CallError."""
        with self._lock:
            self.in_flight += 1
        try:
            yield from self._read([*_OUTPUTS, *_TIMES], tensors, {scoring.TICKET: ticket})
        finally:
            with self._lock:
                self.in_flight -= 1

    def cancel(self, ticket: str) -> None:
        """Ends a request, whose iterator then raises CallError."""
        list(self._read(["text_output"], [], {scoring.CANCEL: ticket}))

    def score(self, input_ids: Sequence[int], start: int) -> list[LogProbabilities]:
        """For each token from `start` on, the log-probabilities of the likeliest ones in its place."""
        tensor = pb_utils.Tensor("input_ids", np.array(input_ids, np.int32))
        responses = list(self._read(["text_output"], [tensor], {scoring.SCORE_FROM: start}))
        text = pb_utils.get_output_tensor_by_name(responses[0], "text_output").as_numpy()[0]
        return scoring.read_score(text.decode())

    def _read(self, outputs: list[str], tensors: Sequence[Any], parameters: dict[str, Any]) -> Iterator[Any]:
        """The responses of `_call`, which runs on its own thread: it may wait for ever for a model that died."""
        responses: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def read() -> None:
            try:
                for response in self._call(outputs, tensors, parameters):
                    responses.put(response)
                responses.put(None)
            except Exception as error:
                responses.put(error)

        threading.Thread(target=read, name=f"read {self.name}", daemon=True).start()
        while True:
            try:
                response = responses.get(timeout=_PROBE)
            except queue.Empty:
                if self.up:
                    continue
                raise CallError(f"variant '{self.name}' is down") from None
            if response is None:
                return
            if isinstance(response, Exception):
                raise response
            yield response

    def _call(self, outputs: list[str], tensors: Sequence[Any], parameters: dict[str, Any]) -> Iterator[Any]:
        """The responses that hold tensors, as they come. Raises CallError."""
        request = pb_utils.InferenceRequest(
            model_name=self.model, inputs=list(tensors), requested_output_names=outputs, parameters=parameters
        )
        try:
            responses = request.exec(decoupled=True)
        except pb_utils.TritonModelException as error:  # the model is not loaded
            raise CallError(str(error)) from None
        try:
            for response in responses:
                if response.has_error():
                    failure = response.error()
                    raise CallError(failure.message(), failure.code())
                if response.output_tensors():
                    yield response
        finally:
            self._ended.append((time.monotonic(), responses))

    def _probe(self) -> None:
        while True:
            try:
                list(self._call(["text_output"], [], {scoring.CANCEL: ""}))
                self._answers_probes = True
            except CallError:
                self._answers_probes = False
            self._answered = time.monotonic()
            self._release_ended()
            time.sleep(_PROBE)

    def _release_ended(self) -> None:
        """Frees the responses of calls that ended `_KEPT` seconds ago.

        The backend keeps its own reference until soon after a call's end, and drops it on a thread without the GIL. If
        that were the last one, Python objects would be freed there and memory be corrupted (Triton before 24.12:
        python_backend's pull request 390).
        """
        while self._ended and self._ended[0][0] < time.monotonic() - _KEPT:
            self._ended.popleft()
