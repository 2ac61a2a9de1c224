"""A deployed build answers over HTTP and gRPC with the tokens that its engine gives in process."""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.config import Workload
from benchmarks.serving.drivers import triton
from benchmarks.serving.workload import make_requests
from builder.config import DeployConfig, EngineConfig
from builder.deploy.repository import write_repository
from builder.deploy.server import Ports, Server
from builder.engines.base import Engine, Request
from plugins.common.errors import UserError

grpc = pytest.importorskip("tritonclient.grpc", reason="needs the extra 'triton'")
pytest.importorskip("pytriton", reason="needs the extra 'triton'")

DOCS_LLAMA = Path(__file__).parents[2] / "examples" / "docs-llama"
BATCH = 4
PROMPT = "The SELECT statement"


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


@pytest.fixture(scope="module")
def engine(build: Path) -> Engine:
    from builder.engines.torch_backend import artifact

    return artifact.load(build / "engine")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DOCS_LLAMA)


def tokens_of(engine: Engine, input_ids: list[int], **options: Any) -> list[int]:
    """What the engine gives in this process."""
    request = Request("here", tuple(input_ids), **{"max_new_tokens": 12, **options})
    return [token.token for token in engine.generate([request])]


def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    """The raw answer to a POST; raises HTTPError."""
    url = f"http://{server.url()}/v2/models/{path}"
    return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=60)


def generate(server: Server, model: str = "llm", **body: Any) -> dict[str, Any]:
    with post(server, f"{model}/generate", body) as answer:
        reply: dict[str, Any] = json.load(answer)
    reply["output_ids"] = np.atleast_1d(reply["output_ids"]).tolist()  # Triton writes one value without brackets
    return reply


def generate_stream(server: Server, **body: Any) -> list[dict[str, Any]]:
    with post(server, "llm/generate_stream", {"stream": True, **body}) as answer:
        return [json.loads(line.removeprefix(b"data: ")) for line in answer if line.startswith(b"data: ")]


def streamed(chunks: list[dict[str, Any]]) -> list[int]:
    """The tokens of a stream: one in a chunk, or several where the server had several."""
    return [token for chunk in chunks for token in np.atleast_1d(chunk["output_ids"]).tolist()]


def refusal(server: Server, model: str = "llm", **body: Any) -> str:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(server, f"{model}/generate", body)
    words: str = json.load(caught.value)["error"]
    return words


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


@pytest.mark.parametrize("model", ["llm", "cached"])
def test_generate_gives_the_engines_tokens_and_text(server: Server, engine: Engine, tokenizer: Any, model: str) -> None:
    reply = generate(server, model, text_input=PROMPT, max_tokens=12)
    expected = tokens_of(engine, tokenizer.encode(PROMPT))
    assert reply["output_ids"] == expected
    assert reply["num_output_tokens"] == len(expected)
    assert reply["num_input_tokens"] == len(tokenizer.encode(PROMPT))
    assert (
        tokenizer.decode(tokenizer.encode(PROMPT) + expected, skip_special_tokens=True) == PROMPT + reply["text_output"]
    )


def test_a_prompt_that_begins_with_bos_gets_no_second_one(server: Server, tokenizer: Any) -> None:
    length = len(tokenizer.encode(PROMPT))
    counts = {
        text: generate(server, text_input=text, max_tokens=1)["num_input_tokens"]
        for text in (PROMPT, tokenizer.bos_token + PROMPT)
    }
    assert set(counts.values()) == {length}
    bare = generate(server, text_input=PROMPT, max_tokens=1, add_special_tokens=False)
    assert bare["num_input_tokens"] == length - 1


def test_a_stream_brings_tokens_as_they_come(server: Server, engine: Engine, tokenizer: Any) -> None:
    chunks = generate_stream(server, text_input=PROMPT, max_tokens=12)
    expected = tokens_of(engine, tokenizer.encode(PROMPT))
    assert streamed(chunks) == expected
    assert len(generate_stream(server, text_input=PROMPT, max_tokens=100)) > 1  # a few tokens may share a chunk
    whole = generate(server, text_input=PROMPT, max_tokens=12)["text_output"]
    assert "".join(chunk["text_output"] for chunk in chunks) == whole
    assert [chunk.get("finish_reason") for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_grpc_streams_the_same_tokens(server: Server, engine: Engine, tokenizer: Any) -> None:
    replies: queue.Queue[Any] = queue.Queue()
    inputs = [
        tensor("text_input", "BYTES", PROMPT.encode()),
        tensor("max_tokens", "INT32", 12),
        tensor("stream", "BOOL", True),
    ]
    tokens: list[int] = []
    with grpc.InferenceServerClient(server.url("grpc")) as client:
        client.start_stream(lambda result, error: replies.put((result, error)))
        client.async_stream_infer("llm", inputs, enable_empty_final_response=True)
        final = False
        while not final:
            result, error = replies.get(timeout=60)
            assert error is None
            final = result.get_response().parameters["triton_final_response"].bool_param
            tokens += result.as_numpy("output_ids").tolist()
    assert tokens == tokens_of(engine, tokenizer.encode(PROMPT))


def test_grpc_asks_the_caching_model_plainly(server: Server, engine: Engine) -> None:
    inputs = [tensor("input_ids", "INT32", 5, 6, 7, batched=True), tensor("max_tokens", "INT32", 12, batched=True)]
    with grpc.InferenceServerClient(server.url("grpc")) as client:
        result = client.infer("cached", inputs)
    assert result.as_numpy("output_ids").tolist() == tokens_of(engine, [5, 6, 7])


def test_clients_at_once_get_each_their_own_answer(server: Server, engine: Engine) -> None:
    prompts = [[10 + index, 20 + index, 30] for index in range(8)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        streams = list(pool.map(lambda ids: generate_stream(server, input_ids=ids, max_tokens=12), prompts))
    for prompt, chunks in zip(prompts, streams, strict=True):
        assert streamed(chunks) == tokens_of(engine, prompt)


def test_sampling_follows_the_seed(server: Server, engine: Engine) -> None:
    options = {"temperature": 1.0, "top_k": 50, "seed": 7}
    first = generate(server, input_ids=[5, 6, 7], max_tokens=12, **options)["output_ids"]
    assert first == generate(server, input_ids=[5, 6, 7], max_tokens=12, **options)["output_ids"]
    assert first == tokens_of(engine, [5, 6, 7], **options)
    other = generate(server, input_ids=[5, 6, 7], max_tokens=12, **{**options, "seed": 8})["output_ids"]
    assert first != other


def test_a_repeated_request_is_answered_from_the_cache(server: Server) -> None:
    ask = {"text_input": "A trigger is", "max_tokens": 5}
    hits, made = (
        metric(server, "nv_cache_num_hits_per_model", "cached"),
        metric(server, "twofour_output_tokens", "cached"),
    )
    first = generate(server, "cached", **ask)
    assert metric(server, "nv_cache_num_hits_per_model", "cached") == hits
    assert generate(server, "cached", **ask) == first
    assert metric(server, "nv_cache_num_hits_per_model", "cached") == hits + 1
    assert metric(server, "twofour_output_tokens", "cached") == made + 5, "the engine ran once"
    generate(server, "cached", **{**ask, "max_tokens": 6})
    assert metric(server, "nv_cache_num_hits_per_model", "cached") == hits + 1, "another max_tokens is another answer"


def test_the_benchmark_driver_measures_a_server(server: Server) -> None:
    requests = make_requests(Workload(input_tokens=8, output_tokens=6, requests=6), vocabulary=4096)
    records = triton.run(triton.Endpoint(f"http://{server.url()}", "llm"), requests, concurrency=3)
    assert [record.error for record in records] == [None] * 6
    assert {(record.input_tokens, record.output_tokens) for record in records} == {(8, 6)}
    assert all(record.start < record.token_times[0] <= record.end for record in records)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"max_tokens": 3}, "send one of 'text_input' and 'input_ids'"),
        ({"text_input": "a", "max_tokens": 0}, "'max_tokens' is 0"),
        ({"text_input": "a", "max_tokens": 1000}, "512"),
        ({"text_input": "a", "max_token": 3}, "did you mean 'max_tokens'?"),
        ({"input_ids": [1, 4096]}, "'input_ids' holds 4096: the vocabulary ends at 4095"),
        ({"text_input": "a", "stop_words": ["b"]}, "'stop_words' is 'b'"),
        ({"text_input": "a", "top_p": -0.5}, "'top_p' is -0.5"),
    ],
)
@pytest.mark.parametrize("model", ["llm", "cached"])
def test_bad_input_is_answered_and_harms_nothing(server: Server, model: str, body: dict[str, Any], words: str) -> None:
    assert words in refusal(server, model, **body)
    assert generate(server, model, text_input="a", max_tokens=2)["num_output_tokens"] == 2


def test_the_examples_of_the_docs_run(server: Server) -> None:
    page = (DOCS_LLAMA.parents[1] / "docs" / "deploy.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", page, flags=re.M)]
    commands = [block for block in blocks if block.lstrip().startswith("curl")]
    programs = [block for block in blocks if block.lstrip().startswith("import")]
    assert (len(commands), len(programs)) == (1, 1)
    command = commands[0].replace("127.0.0.1:8000", server.url())
    said = subprocess.run(["sh", "-ec", command], capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.count("text_output") > 2
    whole = generate(server, text_input="A trigger is", max_tokens=16)["text_output"]
    program = programs[0].replace("127.0.0.1:8001", server.url("grpc"))
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert said == whole


def test_the_caching_model_says_that_it_cannot_stream(server: Server) -> None:
    assert "deployed without streaming" in refusal(server, "cached", text_input="a", stream=True)


def test_a_full_queue_refuses(server: Server) -> None:
    def attempt(index: int) -> str:
        try:
            generate(server, input_ids=[40 + index], max_tokens=200, ignore_eos=True)
        except urllib.error.HTTPError as error:
            return str(json.load(error)["error"])
        return "answered"

    with ThreadPoolExecutor(BATCH + 4 + 6) as pool:
        answers = list(pool.map(attempt, range(BATCH + 4 + 6)))
    refused = [answer for answer in answers if answer != "answered"]
    assert len(answers) - len(refused) >= BATCH + 4
    assert refused
    assert all(words.endswith("are waiting or running: try again later") for words in refused)


def test_a_client_that_leaves_stops_its_request(server: Server) -> None:
    gone, made = metric(server, "twofour_cancelled_requests", "llm"), metric(server, "twofour_output_tokens", "llm")
    inputs = [
        tensor("input_ids", "INT32", 5, 6, 7),
        tensor("max_tokens", "INT32", 500),
        tensor("stream", "BOOL", True),
        tensor("ignore_eos", "BOOL", True),
    ]
    arrived = threading.Event()
    with grpc.InferenceServerClient(server.url("grpc")) as client:
        client.start_stream(lambda result, error: arrived.set())
        client.async_stream_infer("llm", inputs)
        assert arrived.wait(60)
        client.stop_stream(cancel_requests=True)
    deadline = time.monotonic() + 10
    while metric(server, "twofour_cancelled_requests", "llm") == gone:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert metric(server, "twofour_output_tokens", "llm") == made


def test_a_model_that_cannot_load_is_explained(build: Path, tmp_path: Path) -> None:
    write_repository(build / "engine", tmp_path / "triton", DeployConfig(engine_path="../../missing"))
    with (
        pytest.raises(UserError, match=r"stopped before it was ready: .*no engine at '.*missing'"),
        Server(tmp_path / "triton", Ports.free()),
    ):
        pass


def test_serve_says_where_and_leaves_nothing_behind(build: Path, tmp_path: Path) -> None:
    ports = Ports.free()
    write_repository(build / "engine", tmp_path / "triton", DeployConfig())
    code = "import sys; from pathlib import Path; from builder.deploy.server import Ports, serve; "
    code += f"serve(Path(sys.argv[1]), {ports!r})"
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code, str(tmp_path / "triton")],
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),  # as a shell's background job starts
    )
    assert process.stdout is not None
    said = [next(process.stdout) for _ in range(6)]
    assert f"http://127.0.0.1:{ports.http}" in said[1]
    command = said[4].partition("try  ")[2].strip()
    answer = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert "text_output" in json.loads(answer.stdout)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=45) == 0
    assert "stopping" in process.stdout.read()
    Ports.check(ports, "127.0.0.1")
