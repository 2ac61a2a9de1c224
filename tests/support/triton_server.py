"""A Triton server with a small model, and its clients."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builder.config import DeployConfig, EngineConfig
from builder.deploy.repository import write_repository
from builder.deploy.server import Ports, Server

grpc = pytest.importorskip("tritonclient.grpc", reason="needs the extra 'triton'")


DOCS_LLAMA = Path(__file__).parents[2] / "examples" / "docs-llama"


BATCH = 4


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build: an engine and a repository with a streaming and a caching model of it."""
    from builder.engines.torch_backend import artifact

    directory = tmp_path_factory.mktemp("build")
    artifact.build(DOCS_LLAMA, directory / "engine", EngineConfig(max_batch_size=BATCH, max_seq_len=512))
    repository = directory / "triton"
    write_repository(directory / "engine", repository, DeployConfig(model_name="llm", max_queue_size=4))
    caching = DeployConfig(model_name="cached", response_cache=True, dynamic_batching=True)
    write_repository(directory / "engine", repository, caching)
    return directory


@pytest.fixture(scope="module")
def server(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    moved = tmp_path_factory.mktemp("moved") / "build"
    shutil.copytree(build, moved)  # a build is deployed where it was not made
    with Server(moved / "triton", Ports.free(), log=moved / "log.txt") as running:
        yield running


def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    """The raw answer to a POST; raises HTTPError."""
    url = f"http://{server.url()}/v2/models/{path}"
    return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60)


def generate(server: Server, model: str = "llm", **body: Any) -> dict[str, Any]:
    with post(server, f"{model}/generate", body) as answer:
        reply: dict[str, Any] = json.load(answer)
    reply["output_ids"] = np.atleast_1d(reply["output_ids"]).tolist()  # Triton writes one value without brackets
    return reply


def refusal(server: Server, model: str = "llm", **body: Any) -> str:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, f"{model}/generate", body)
    fragment: str = json.load(caught.value)["error"]
    return fragment


def metric(server: Server, name: str, model: str) -> float:
    with urllib.request.urlopen(f"http://{server.url('metrics')}/metrics", timeout=10) as page:
        lines = page.read().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(name + "{") and f'"{model}"' in line)


def tensor(name: str, kind: str, *values: Any, batched: bool = False) -> Any:
    data = np.array(values, dtype={"BYTES": object, "INT32": np.int32, "BOOL": bool}[kind])
    data = data[np.newaxis] if batched else data
    one = grpc.InferInput(name, data.shape, kind)
    one.set_data_from_numpy(data)
    return one
