"""A router on a real tritonserver: each request is answered once, by a variant that is up, and says by which."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import builder.deploy.server as server_module
from builder.config import EngineConfig
from builder.deploy.scoring import read_score, score
from builder.deploy.server import Ports, Server
from builder.engines.base import Engine, Request
from builder.pipeline.rebuild import deploy
from calibration.routing.divergence import TRITON
from calibration.routing.metrics import METRICS, REQUESTS
from plugins.common.errors import UserError
from tests.support.routing import EASY, HARD, UNREADABLE, learned_router

grpc = pytest.importorskip("tritonclient.grpc", reason="needs the extra 'triton'")
pytest.importorskip("pytriton", reason="needs the extra 'triton'")

DOCS_LLAMA = Path(__file__).parents[2] / "examples" / "docs-llama"
OPTIONS = {"model_name": "llm", "streaming": None, "response_cache": False, "dynamic_batching": False}


class Explicit(Server):
    """A server that loads and unloads models on request."""

    def _arguments(self, *arguments: Any, **options: Any) -> list[str]:
        return [*super()._arguments(*arguments, **options), "--model-control-mode=explicit", "--load-model=*"]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build with an engine, a router that shadows every request, and its repository. Both engines are dense."""
    from builder.engines.torch_backend import artifact

    out = tmp_path_factory.mktemp("build") / "OUT"
    artifact.build(DOCS_LLAMA, out / "engine", EngineConfig(max_batch_size=4, max_seq_len=512))
    learned_router().save(out / "routing")
    (out / "recipe.yaml").write_text(f"model: {DOCS_LLAMA}\nrouting: {{shadow: 100%}}\n")
    deploy(out, OPTIONS)
    return out


@pytest.fixture(scope="module")
def server(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TWOFOUR_STORE", str(tmp_path_factory.mktemp("store")))
        with Explicit(build / "triton", Ports.free(), log=build.parent / "log.txt") as running:
            yield running


@pytest.fixture(scope="module")
def engine(build: Path) -> Engine:
    from builder.engines.torch_backend import artifact

    return artifact.load(build / "engine")


def tokens_of(engine: Engine, input_ids: list[int], count: int = 12) -> list[int]:
    return [token.token for token in engine.generate([Request("here", tuple(input_ids), count, ignore_eos=True)])]


def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(f"http://{server.url()}/v2/{path}", json.dumps(body).encode())
    return urllib.request.urlopen(request, timeout=60)


def generate(server: Server, input_ids: list[int], count: int = 12, **fields: Any) -> tuple[str, list[int]]:
    body = {"input_ids": input_ids, "max_tokens": count, "ignore_eos": True, **fields}
    with post(server, "models/llm/generate", body) as answer:
        reply = json.load(answer)
    return reply["variant"], np.atleast_1d(reply["output_ids"]).tolist()


def refusal(server: Server, **body: Any) -> str:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, "models/llm/generate", body)
    return str(json.load(caught.value)["error"])


def metric_lines(server: Server) -> list[str]:
    with urllib.request.urlopen(f"http://{server.url('metrics')}/metrics", timeout=10) as page:
        return page.read().decode().splitlines()


def metric(server: Server, name: str, *labels: str) -> float:
    lines = [line for line in metric_lines(server) if line.startswith(name + "{")]
    return sum(float(line.split()[-1]) for line in lines if all(f'"{label}"' in line for label in labels))


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("prompt", "fields", "answers"),
    [
        (EASY, {}, "built"),
        (HARD, {}, "dense"),
        (UNREADABLE, {}, "dense"),
        (EASY, {"quality": "high"}, "dense"),
        (HARD, {"quality": "fast"}, "built"),
        (HARD, {"variant": "built"}, "built"),
        ([5], {}, "built"),
    ],
)
def test_the_response_has_the_engines_tokens_and_names_its_variant(
    server: Server, engine: Engine, prompt: list[int], fields: dict[str, str], answers: str
) -> None:
    assert generate(server, prompt, **fields) == (answers, tokens_of(engine, prompt))


def test_every_part_of_a_stream_names_its_variant(server: Server, engine: Engine) -> None:
    body = {"input_ids": EASY, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with post(server, "models/llm/generate_stream", body) as answer:
        chunks = [json.loads(line.removeprefix(b"data: ")) for line in answer if line.startswith(b"data: ")]
    assert len(chunks) > 1
    assert {chunk["variant"] for chunk in chunks} == {"built"}
    tokens = [token for chunk in chunks for token in np.atleast_1d(chunk["output_ids"]).tolist()]
    assert tokens == tokens_of(engine, EASY, 200)
    assert [chunk.get("finish_reason") for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_requests_at_once_are_each_answered_once(server: Server) -> None:
    def ask(index: int) -> tuple[str, int, int]:
        easy = index % 2 == 0
        body = {"input_ids": [5 if easy else 3000] * (1 + index), "max_tokens": 1 + index % 13, "ignore_eos": True}
        with post(server, "models/llm/generate", body) as answer:
            reply = json.load(answer)
        return reply["variant"], reply["num_input_tokens"], len(np.atleast_1d(reply["output_ids"]))

    before = metric(server, REQUESTS)
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(64)))
    assert [answer[1:] for answer in answers] == [(1 + index, 1 + index % 13) for index in range(64)]
    assert {variant for variant, *_ in answers} == {"dense", "built"}
    until(lambda: metric(server, REQUESTS) == before + 64)


@pytest.mark.parametrize(
    ("body", "fragment"),
    [
        ({"input_ids": EASY, "quality": "best"}, "'quality' is 'best': send one of high, auto, fast"),
        ({"input_ids": EASY, "variant": "tiny"}, "'variant' is 'tiny': send one of dense, built"),
        ({"input_ids": EASY, "max_token": 5}, "did you mean 'max_tokens'?"),
        ({"input_ids": EASY, "max_tokens": 0}, "'max_tokens' is 0"),
        ({"input_ids": [5, 5000]}, "beyond the vocabulary"),
        ({"input_ids": EASY, "max_tokens": 5000}, "512"),
        ({"max_tokens": 5}, "send one of 'text_input' and 'input_ids'"),
        ({"text_input": "", "add_special_tokens": False}, "the prompt is empty"),
    ],
)
def test_bad_input_is_answered_and_harms_nothing(server: Server, body: dict[str, Any], fragment: str) -> None:
    assert fragment in refusal(server, **body)
    assert generate(server, EASY, 2)[0] == "built"


def test_shadow_runs_find_no_loss_between_equal_engines(server: Server) -> None:
    before = metric(server, "twofour_router_measured_total")
    generate(server, EASY)
    until(lambda: metric(server, "twofour_router_measured_total") > before)
    assert metric(server, "twofour_router_shadows_failed_total") == 0
    assert metric(server, "twofour_router_measured_loss") < 1e-5


def test_the_metrics_page_has_each_of_the_routers(server: Server) -> None:
    generate(server, EASY, 2)
    until(lambda: metric(server, REQUESTS, "built", "auto") > 0)
    lines = metric_lines(server)
    assert {line.split()[2] for line in lines if line.startswith("# TYPE twofour_router")} == METRICS.keys()


def test_a_score_is_the_engines_log_probabilities(engine: Engine) -> None:
    import torch

    ids = [*EASY, 9, 11, 40]
    expected = engine.logits(torch.tensor([ids]))[0].log_softmax(-1)
    positions = read_score(score(engine, ids, len(EASY)))
    assert len(positions) == 3
    for place, top in enumerate(positions, start=len(EASY) - 1):
        assert len(top) == TRITON.top
        for token, value in top.items():
            assert value == pytest.approx(float(expected[place, int(token)]), abs=1e-5)  # type: ignore[call-overload]


def test_a_client_that_leaves_stops_its_request_behind(server: Server) -> None:
    gone = metric(server, "twofour_cancelled_requests", "llm_built")
    replies: queue.Queue[Any] = queue.Queue()
    inputs = [tensor("input_ids", "INT32", *EASY), tensor("max_tokens", "INT32", 500), tensor("stream", "BOOL", True),
              tensor("ignore_eos", "BOOL", True)]  # fmt: skip
    with grpc.InferenceServerClient(server.url("grpc")) as client:
        client.start_stream(lambda result, error: replies.put((result, error)))
        client.async_stream_infer("llm", inputs, parameters={"quality": "fast"})
        result, error = replies.get(timeout=20)
        assert error is None
        assert result.as_numpy("variant")[0] == b"built"
        client.stop_stream(cancel_requests=True)
    until(lambda: metric(server, "twofour_cancelled_requests", "llm_built") == gone + 1)
    assert generate(server, EASY, 2)[0] == "built"


def tensor(name: str, kind: str, *values: Any) -> Any:
    data = np.array(values, dtype={"INT32": np.int32, "BOOL": bool}[kind])
    one = grpc.InferInput(name, data.shape, kind)
    one.set_data_from_numpy(data)
    return one


def test_an_unloaded_variant_is_routed_around_until_it_is_back(server: Server) -> None:
    post(server, "repository/models/llm_built/unload", {}).close()
    assert {generate(server, EASY, 2)[0] for _ in range(5)} == {"dense"}
    assert generate(server, EASY, 2, quality="fast")[0] == "dense"
    post(server, "repository/models/llm_built/load", {}).close()
    until(lambda: generate(server, EASY, 2)[0] == "built")
    post(server, "repository/models/llm_dense/unload", {}).close()
    until(lambda: generate(server, HARD, 2, quality="high")[0] == "built")
    post(server, "repository/models/llm_built/unload", {}).close()
    until(lambda: "no variant is up" in refusal(server, input_ids=EASY))
    for name in ("llm_dense", "llm_built"):
        post(server, f"repository/models/{name}/load", {}).close()
    until(lambda: generate_or_none(server) == "built")


def generate_or_none(server: Server) -> str | None:
    try:
        return generate(server, EASY, 2)[0]
    except urllib.error.HTTPError:
        return None


def test_a_killed_variant_loses_no_request_and_a_restart_keeps_the_threshold(
    build: Path, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far on, the other sums of a batch of eight may choose another of two tokens that are as likely."""
    monkeypatch.setenv("TWOFOUR_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(server_module, "STOP_SECONDS", 3)  # Triton waits for the killed model's requests
    expected = tokens_of(engine, EASY, 480)
    answers: list[tuple[str, list[int]]] = []
    with Explicit(build / "triton", Ports.free(), log=tmp_path / "log.txt") as server:
        generate(server, EASY)
        until(lambda: metric(server, "twofour_router_measured_total") > 0)
        [stub] = stubs(server, "llm_built")
        ask = lambda: answers.append(generate(server, EASY, 480, quality="fast"))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        os.kill(stub, 9)
        for thread in threads:
            thread.join(30)
        assert [(len(tokens), tokens[:300]) for _, tokens in answers] == [(480, expected[:300])] * 8
        assert generate(server, EASY)[0] == "dense"
        left = [pid for name in ("llm", "llm_dense") for pid in stubs(server, name)]
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left))
    with Explicit(build / "triton", Ports.free(), log=tmp_path / "log.txt") as server:
        assert generate(server, EASY)[0] == "built"
    [state] = (tmp_path / "store" / "routing").glob("*.json")
    assert json.loads(state.read_text())["measured"] >= 1


def stubs(server: Server, model: str) -> list[int]:
    """The processes of a model of this server."""
    assert server._process is not None
    listed = subprocess.run(["ps", "-wweo", "pid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()[1:]]
    own = str(server._process.pid)
    return [int(row[0]) for row in rows if "_stub" in row[1] and own in row and f"/{model}/1/" in row[2]]


@pytest.mark.parametrize(
    ("option", "fragment"),
    [
        ({"response_cache": True}, "response_cache is for one engine"),
        ({"dynamic_batching": True}, "dynamic_batching is for one engine"),
        ({"streaming": False}, "a router streams, and streaming is off"),
    ],
)
def test_options_that_a_router_lacks_are_refused(build: Path, option: dict[str, Any], fragment: str) -> None:
    before = sorted((build / "triton").rglob("*"))
    with pytest.raises(UserError, match=fragment):
        deploy(build, {**OPTIONS, **option})
    assert sorted((build / "triton").rglob("*")) == before
