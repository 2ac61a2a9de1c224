"""The proxy of `twofour route` in front of two servers of the tests' own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder.deploy.route import Options, make_proxy
from calibration.routing.controller import Settings
from tests.support.openai_server import OpenAIServer, until
from tests.support.routing import EASY, learned_router

httpx = pytest.importorskip("httpx", reason="needs the extra 'route'")


uvicorn = pytest.importorskip("uvicorn", reason="needs the extra 'route'")


DOCS_LLAMA = Path(__file__).parents[2] / "examples" / "docs-llama"


MIXED = Settings(shadow=0.0)


@contextmanager
def routed(dense: OpenAIServer, built: OpenAIServer, **options: Any) -> Iterator[Any]:
    """A client of a proxy in front of the two servers."""
    chosen = replace(Options(dense.url, built.url, settings=MIXED), **options)
    proxy, service = make_proxy(learned_router(), DOCS_LLAMA, chosen)
    server = uvicorn.Server(uvicorn.Config(proxy.app(), host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
            until(lambda: len(client.get("/v1/models").json()["data"]) == 2)
            yield client
    finally:
        server.should_exit = True
        thread.join(20)
        service.close()


@pytest.fixture
def servers() -> Iterator[tuple[OpenAIServer, OpenAIServer]]:
    with ExitStack() as stack:
        yield (
            stack.enter_context(OpenAIServer("dense").running()),
            stack.enter_context(OpenAIServer("built").running()),
        )


def complete(client: Any, prompt: Any = EASY, **fields: Any) -> Any:
    return client.post("/v1/completions", json={"model": "any", "prompt": prompt, **fields})


def metric(client: Any, name: str) -> float:
    page = client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in page if line.startswith((f"{name} ", f"{name}{{")))
