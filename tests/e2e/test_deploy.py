"""A deployed build answers over HTTP and gRPC with the tokens that its engine gives in process."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.config import Workload
from benchmarks.serving.drivers import triton
from benchmarks.serving.workload import make_requests
from builder.deploy.server import Server
from builder.engines.base import Engine, Request
from tests.support.triton_server import DOCS_LLAMA, generate, grpc, metric, post, refusal, tensor
from tests.support.triton_server import build as build
from tests.support.triton_server import server as server

pytest.importorskip("pytriton", reason="needs the extra 'triton'")


PROMPT = "The SELECT statement"


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


def generate_stream(server: Server, **body: Any) -> list[dict[str, Any]]:
    with post(server, "llm/generate_stream", {"stream": True, **body}) as answer:
        return [json.loads(line.removeprefix(b"data: ")) for line in answer if line.startswith(b"data: ")]


def streamed(chunks: list[dict[str, Any]]) -> list[int]:
    """The tokens of a stream: one in a chunk, or several where the server had several."""
    return [token for chunk in chunks for token in np.atleast_1d(chunk["output_ids"]).tolist()]


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
    ("body", "fragment"),
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
def test_bad_input_is_answered_and_harms_nothing(
    server: Server, model: str, body: dict[str, Any], fragment: str
) -> None:
    assert fragment in refusal(server, model, **body)
    assert generate(server, model, text_input="a", max_tokens=2)["num_output_tokens"] == 2


def test_the_examples_of_the_docs_run(server: Server) -> None:
    page = (DOCS_LLAMA.parents[1] / "docs" / "deploy.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", page, flags=re.M)]
    commands = [block for block in blocks if block.lstrip().startswith("curl")]
    programs = [block for block in blocks if block.lstrip().startswith("import")]
    assert (len(commands), len(programs)) == (1, 1)
    command = commands[0].replace("127.0.0.1:8000", server.url())
    printed = subprocess.run(["sh", "-ec", command], capture_output=True, text=True, timeout=60, check=True).stdout
    assert printed.count("text_output") > 2
    whole = generate(server, text_input="A trigger is", max_tokens=16)["text_output"]
    program = programs[0].replace("127.0.0.1:8001", server.url("grpc"))
    printed = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert printed == whole
