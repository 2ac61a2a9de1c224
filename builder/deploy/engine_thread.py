"""Continuous batching: one thread owns the engine, requests join its running batch from any thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial

from builder.engines.base import Engine, Request, Token

Receive = Callable[["Token | Exception"], None]
"""Receives each token of a request, or the exception that ends it. Runs on the engine's thread and must not block."""


class EngineLoop:
    """Runs `engine` on its own thread until `stop`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._receivers: dict[str, Receive] = {}
        self._failure: Exception | None = None
        self._running = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, receive: Receive) -> None:
        """Queues a request. Errors in it are passed to `receive`."""
        self._commands.put(partial(self._add, request, receive))

    def cancel(self, request_id: str) -> None:
        """Ends a request. If the engine cannot cancel, the request finishes and its tokens are discarded."""
        self._commands.put(partial(self._drop, request_id))

    def run(self, job: Callable[[Engine], None]) -> None:
        """Runs `job` with the engine between two of its steps. It must not raise."""
        self._commands.put(lambda: job(self._engine))

    def stop(self) -> None:
        """Ends the thread after the current step; open requests get no more tokens."""
        self._commands.put(self._halt)
        self._thread.join()

    def _run(self) -> None:
        while self._running:
            self._drain()
            if self._running and self._failure is None and self._engine.busy:
                self._step()

    def _drain(self) -> None:
        """Runs the queued commands; waits for one if there is nothing to compute."""
        idle = self._failure is not None or not self._engine.busy
        while True:
            try:
                order = self._commands.get(block=idle)
            except queue.Empty:
                return
            order()
            idle = False

    def _step(self) -> None:
        try:
            tokens = self._engine.step()
        except Exception as error:
            self._fail(error)
            return
        for token in tokens:
            receive = self._receivers.get(token.request_id)
            if receive is not None:
                receive(token)
                if token.last:
                    del self._receivers[token.request_id]

    def _add(self, request: Request, receive: Receive) -> None:
        if self._failure is not None:
            receive(RuntimeError(f"the engine stopped ({self._failure}): restart the server"))
            return
        try:
            self._engine.add(request)
        except Exception as error:
            receive(error)
        else:
            self._receivers[request.id] = receive

    def _drop(self, request_id: str) -> None:
        cancel = getattr(self._engine, "cancel", None)
        if self._receivers.pop(request_id, None) is None or cancel is None:
            return
        try:
            cancel(request_id)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Passes the error to every client: the engine's state is unknown now."""
        self._failure = error
        for receive in self._receivers.values():
            receive(error)
        self._receivers.clear()

    def _halt(self) -> None:
        self._running = False
