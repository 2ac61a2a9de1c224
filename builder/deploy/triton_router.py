"""The router's model in Triton: a deployed router's `model.py` is this class. It answers with the models behind it.

Each request has a thread, which passes the chosen model's responses on as they come. One more thread looks for clients
that left, and writes the metrics.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from builder.deploy import request_schema
from builder.deploy.response import CallError, CancelledError, FullError, send_error
from builder.deploy.routed_repository import state_file
from builder.deploy.router_metrics import TritonMetrics
from builder.deploy.variant_calls import Variant
from calibration.routing import metrics
from calibration.routing.controller import Decision, Settings, UnavailableError, route_around
from calibration.routing.divergence import LogProbabilities, mean_kl
from calibration.routing.router import Router
from calibration.routing.service import RouterService

_LOOK = 0.02  # seconds between two looks for clients that left
_SHADOW_TOKENS = 32  # tokens of an answer that a shadow run scores


@dataclass
class Open:
    """A request being answered. The lock: Triton crashes on a look at a sender that has sent its last response."""

    sender: Any
    ticket: str
    tensors: Sequence[Any]
    input_ids: list[int]
    output_ids: list[int] = field(default_factory=list)
    variant: Variant | None = None
    answered: bool = False  # a part of the answer was sent
    left: bool = False  # the client left
    _ended: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def send(self, tensors: Sequence[Any], last: bool) -> None:
        """Sends one response."""
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if last else 0
        with self._lock:
            self.sender.send(pb_utils.InferenceResponse(output_tensors=list(tensors)), flags=flags)
            self.answered, self._ended = True, last

    def fail(self, error: Exception) -> None:
        """Sends the error that ends the response, unless it has ended."""
        with self._lock:
            if not self._ended:
                self._ended = True
                send_error(self.sender, error)

    def is_cancelled(self) -> bool:
        """Whether the client left before the end."""
        with self._lock:
            return not self._ended and bool(self.sender.is_cancelled())


class RouterModel:
    """Routes requests between the variants of config.pbtxt's parameters."""

    def initialize(self, args: dict[str, str]) -> None:
        from calibration.data.tokenizer import load_tokenizer

        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        here = Path(args["model_repository"])
        router = Router.load((here / parameters["router_dir"]).resolve())
        self._seen = router.seen["triton"]
        self._tokenizer = load_tokenizer((here / parameters["tokenizer_dir"]).resolve())
        self._variants = {name: Variant(name, *facts) for name, facts in json.loads(parameters["variants"]).items()}
        state = Path(parameters["state_file"]) if parameters["state_file"] else state_file(router.build_id)
        self._service = RouterService(
            router,
            idle=lambda: not self._open,
            settings=Settings(shadow=float(parameters["shadow"]), rest=float(parameters["rest"])),
            state_file=state,
        )
        self._metrics = TritonMetrics(args["model_name"])
        self._open: dict[str, Open] = {}
        self._capacity = sum(variant.capacity for variant in self._variants.values())
        self._refuses = parameters["max_queue_size"] != "0"
        self._pool = ThreadPoolExecutor(self._capacity)
        self._watched = False
        self._stopping = threading.Event()
        self._watch = threading.Thread(target=self._look, name="watch", daemon=True)
        self._watch.start()

    def execute(self, requests: list[Any]) -> None:
        """Starts the requests; their threads send the responses."""
        if not self._watched:  # not before the models behind are loaded
            for variant in self._variants.values():
                variant.watch()
            self._watched = True
        for request in requests:
            sender = request.get_response_sender()
            try:
                if self._refuses and len(self._open) >= self._capacity:
                    raise FullError(f"{len(self._open)} requests are waiting or running: try again later")
                parameters = json.loads(request.parameters())
                requested = {name: parameters.pop(name) for name in ("quality", "variant") if name in parameters}
                tensors = request.inputs()
                values = request_schema.read({tensor.name(): tensor.as_numpy() for tensor in tensors}, parameters)
                opened = Open(sender, secrets.token_hex(8), tensors, self._input_ids(values))
                self._open[opened.ticket] = opened
                self._pool.submit(self._serve, opened, requested)
            except Exception as error:
                send_error(sender, error)

    def finalize(self) -> None:
        self._stopping.set()
        self._watch.join()
        self._pool.shutdown()
        self._service.close()

    def _input_ids(self, values: dict[str, Any]) -> list[int]:
        from calibration.data.encoding import encode_text

        if "input_ids" in values:
            return list(values["input_ids"])
        return encode_text(self._tokenizer, values.get("text_input", ""), values.get("add_special_tokens", True))

    def _serve(self, opened: Open, requested: dict[str, Any]) -> None:
        """Answers one request, on its own thread."""
        try:
            up, full = self._conditions()
            dense, cheap = list(self._variants.values())[:2]
            tokens_T = np.array(opened.input_ids, np.int64)
            prefill = partial(_next_token, cheap, opened.input_ids)
            decision = self._service.decide(tokens_T, prefill, **requested, up=up, full=full, load=dense.load)
            self._forward(opened, decision)
            self._service.answered(decision, lambda: _loss(dense, cheap, opened) / self._seen)
        except Exception as error:
            opened.fail(error)
        finally:
            del self._open[opened.ticket]

    def _forward(self, opened: Open, decision: Decision) -> None:
        """Sends the answer of the variant decided on, or of the next one where that fails before it answers."""
        name, refused = decision.variant, set[str]()
        while True:
            try:
                self._relay(opened, self._variants[name])
                return
            except CallError as error:
                if opened.left:
                    raise CancelledError("the client cancelled the request") from None
                refused.add(name)
                up, full = self._conditions()
                name = self._next(decision, refused, up, full)
                if opened.answered or name in refused or not _may_retry(error):
                    raise
                self._service.controller.count(metrics.REROUTED)

    def _next(self, decision: Decision, refused: set[str], up: set[str], full: set[str]) -> str:
        """The variant to try after some rejected the request; one of those if there is no other."""
        try:
            return route_around(decision.requested, list(self._variants), up - refused, full)
        except UnavailableError:
            return next(iter(refused))

    def _relay(self, opened: Open, variant: Variant) -> None:
        opened.variant = variant
        name = pb_utils.Tensor("variant", np.array([variant.name.encode()], dtype=object))
        for response in variant.generate(opened.tensors, opened.ticket):
            tensors = response.output_tensors()
            opened.output_ids += pb_utils.get_output_tensor_by_name(response, "output_ids").as_numpy().tolist()
            last = any(tensor.name() == "finish_reason" for tensor in tensors)
            opened.send([*tensors, name], last)
            if last:
                return
        raise CallError(f"variant '{variant.name}' ended without an answer")

    def _conditions(self) -> tuple[set[str], set[str]]:
        """The variants that are up, and those that are full."""
        variants = self._variants.values()
        return {each.name for each in variants if each.up}, {each.name for each in variants if each.full}

    def _look(self) -> None:
        """The watching thread. It ends the process after the server's, which threads that wait for a model outlive."""
        server = os.getppid()
        while not self._stopping.wait(_LOOK):
            if os.getppid() != server:
                self._service.save()
                os._exit(1)
            for opened in list(self._open.values()):
                if not opened.left and opened.variant is not None and opened.is_cancelled():
                    opened.left = True
                    with contextlib.suppress(CallError):
                        opened.variant.cancel(opened.ticket)
            self._metrics.write(self._service.samples())


def _next_token(cheap: Variant, input_ids: list[int]) -> LogProbabilities | None:
    """The cheap variant's likeliest tokens after the prompt; None if it does not answer, so that dense does."""
    try:
        return cheap.score([*input_ids, input_ids[-1]], len(input_ids))[0]  # its replacement has no effect
    except CallError:
        return None


def _loss(dense: Variant, cheap: Variant, opened: Open) -> float:
    """The part of the cheap variant's loss on the sent answer that scores measure, in nats per token."""
    prompt, answer = opened.input_ids, opened.output_ids[:_SHADOW_TOKENS]
    scores = (variant.score([*prompt, *answer], len(prompt)) for variant in (dense, cheap))
    return mean_kl(zip(*scores, strict=True))


def _may_retry(error: CallError) -> bool:
    """Whether another variant may answer: not where the client's own input is wrong."""
    return error.code not in (pb_utils.TritonError.INVALID_ARG, pb_utils.TritonError.CANCELLED)
