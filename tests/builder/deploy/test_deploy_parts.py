"""What serving is made of, without a server: requests, text, the engine's thread, the written repository."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from builder.config import DeployConfig
from builder.deploy import request_schema
from builder.deploy.detokenizer import TextStream
from builder.deploy.engine_thread import EngineLoop
from builder.deploy.installation import Installation, lay_out
from builder.deploy.repository import write_repository
from builder.deploy.server import Ports, Server
from builder.engines.base import Request, Token
from plugins.common.errors import UserError

DOCS_LLAMA = Path(__file__).parents[3] / "examples" / "docs-llama"
LIMITS = request_schema.Limits(vocabulary=100, end_ids=frozenset({1}), max_tokens=7, streaming=True)


def ask(parameters: dict[str, Any] | None = None, **inputs: Any) -> request_schema.ParsedRequest:
    """What the server makes of a client's inputs; letters stand for tokens."""
    tensors = {name: np.array(value, ndmin=1) for name, value in inputs.items()}
    tensors = {name: np.char.encode(tensor) if tensor.dtype.kind == "U" else tensor for name, tensor in tensors.items()}
    values = request_schema.read(tensors, parameters or {})
    return request_schema.understand(
        values,
        "1",
        LIMITS,
        lambda text, special: [0] * bool(special and text) + [ord(letter) - 32 for letter in text],
        lambda ids: f"<{len(ids)}>",
    )


def test_a_bare_prompt_is_greedy_and_bounded() -> None:
    assert ask(text_input="AB").request == Request("1", (0, 33, 34), max_new_tokens=7)


def test_special_tokens_are_left_out_where_the_client_says_so() -> None:
    assert ask(text_input="AB", add_special_tokens=False).request.input_ids == (33, 34)
    assert ask(text_input="AB", sampling_param_add_special_tokens=True).request.input_ids == (0, 33, 34)


def test_text_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(UserError, match="'text_input' is not UTF-8"):
        request_schema.read({"text_input": np.array([b"caf\xe9"], dtype=object)}, {})


def test_llm_api_names_mean_the_same_as_ensemble_names() -> None:
    ensemble = ask(input_ids=[3, 4], max_tokens=9, temperature=0.5, top_k=4, top_p=0.5, seed=6, stream=True)
    llm_api = ask(
        input_ids=[3, 4],
        sampling_param_max_tokens=9,
        sampling_param_temperature=0.5,
        sampling_param_top_k=4,
        sampling_param_top_p=0.5,
        sampling_param_seed=6,
        streaming=True,
    )
    assert ensemble == llm_api
    assert ensemble.stream
    assert ensemble.request == Request("1", (3, 4), 9, temperature=0.5, top_k=4, top_p=0.5, seed=6)


@pytest.mark.parametrize(
    ("inputs", "temperature"),
    [
        ({}, 0.0),
        ({"top_p": 0.9}, 1.0),
        ({"top_k": 5}, 1.0),
        ({"top_k": 1, "temperature": 2.0}, 0.0),
        ({"top_p": 0.0}, 0.0),
    ],
)
def test_top_k_or_top_p_alone_ask_for_sampling(inputs: dict[str, Any], temperature: float) -> None:
    assert ask(text_input="A", **inputs).request.temperature == temperature


def test_the_prompt_comes_back_only_where_asked() -> None:
    assert ask(text_input="AB").echo == ""
    assert ask(text_input="AB", exclude_input_in_output=False).echo == "AB"
    assert ask(input_ids=[3, 4, 5], exclude_input_in_output=False).echo == "<3>"


def test_end_id_minus_one_never_ends() -> None:
    assert ask(text_input="A", end_id=-1).request.ignore_eos
    assert not ask(text_input="A", end_id=1).request.ignore_eos


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({}, "send one of 'text_input' and 'input_ids'"),
        ({"text_input": "A", "input_ids": [3]}, "send one of"),
        ({"text_input": ""}, "the prompt is empty"),
        ({"input_ids": [3, 100]}, "'input_ids' holds 100: the vocabulary ends at 99"),
        ({"input_ids": [-1]}, "'input_ids' holds -1"),
        ({"input_ids": [[3], [4]]}, "'input_ids' holds 2 prompts: send one a request"),
        ({"text_input": ["A", "B"]}, "'text_input' has 2 values"),
        ({"text_input": "A", "max_tokens": 0}, "'max_tokens' is 0: it must be at least 1"),
        ({"text_input": "A", "temperature": -1.0}, "'temperature' is -1"),
        ({"text_input": "A", "temperature": float("nan")}, "'temperature' is nan"),
        ({"text_input": "A", "top_p": 1.5}, "'top_p' is 1.5: it must lie from 0 to 1"),
        ({"text_input": "A", "top_k": -2}, "'top_k' is -2"),
        ({"text_input": "A", "stop_words": ["", "x"]}, "'stop_words' is 'x': this engine takes only ''"),
        ({"text_input": "A", "beam_width": 4}, "'beam_width' is 4"),
        ({"text_input": "A", "sampling_param_best_of": 2}, "'sampling_param_best_of' is 2"),
        ({"text_input": "A", "end_id": 5}, "'end_id' is 5: the model ends at [1]"),
    ],
)
def test_bad_input_is_quoted(inputs: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        ask(**inputs)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_misspelt_field_is_named_with_its_neighbour() -> None:
    with pytest.raises(UserError, match=r"unknown input 'max_token' \(did you mean 'max_tokens'\?\)"):
        ask({"max_token": 5}, text_input="A")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DOCS_LLAMA)


def pieces(tokenizer: Any, prompt: list[int], tokens: list[int]) -> list[str]:
    stream = TextStream(lambda ids: tokenizer.decode(ids, skip_special_tokens=True), prompt)
    return [*(stream.push(token) for token in tokens), stream.flush()]


def test_a_character_of_many_tokens_arrives_whole(tokenizer: Any) -> None:
    ids = tokenizer.encode("naïve 漢字 🙂!", add_special_tokens=False)
    parts = pieces(tokenizer, [], ids)
    assert "".join(parts) == "naïve 漢字 🙂!"
    assert len(ids) > len("naïve 漢字 🙂!"), "this text must split characters, else the test shows nothing"
    assert not any("\ufffd" in part for part in parts)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 4095), max_size=24))
def test_streamed_pieces_join_to_the_decoded_text(tokenizer: Any, tokens: list[int]) -> None:
    assert "".join(pieces(tokenizer, [], tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


class CountingEngine:
    """Obeys the engines' protocol: token i of a request is i. Fails where a prompt says so."""

    backend = "torch"
    max_batch_size = 2

    def __init__(self) -> None:
        self.waiting: list[Request] = []
        self.running: dict[str, tuple[Request, int]] = {}
        self.widest = 0

    def logits(self, input_ids_BT: Any) -> Any:
        raise NotImplementedError

    def add(self, request: Request) -> None:
        if request.input_ids == (13,):
            raise UserError("13 does not fit")
        self.waiting.append(request)

    def cancel(self, request_id: str) -> None:
        self.running.pop(request_id, None)

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Token]:
        while self.waiting and len(self.running) < self.max_batch_size:
            request = self.waiting.pop(0)
            self.running[request.id] = (request, 0)
        self.widest = max(self.widest, len(self.running))
        tokens = []
        for request, index in list(self.running.values()):
            if request.input_ids == (14,):
                raise RuntimeError("the device is gone")
            last = index + 1 == request.max_new_tokens
            tokens.append(Token(request.id, index, index, last, time.perf_counter()))
            self.running[request.id] = (request, index + 1)
            if last:
                del self.running[request.id]
        time.sleep(0.001)
        return tokens

    def generate(self, requests: Any) -> Any:
        raise NotImplementedError


class Ear:
    """Hears one request's events."""

    def __init__(self) -> None:
        self.events: list[Token | Exception] = []
        self.done = threading.Event()

    def __call__(self, event: Token | Exception) -> None:
        self.events.append(event)
        if isinstance(event, Exception) or event.last:
            self.done.set()


def test_requests_join_the_running_batch() -> None:
    engine = CountingEngine()
    loop = EngineLoop(engine)
    ears = [Ear() for _ in range(5)]
    for index, ear in enumerate(ears):
        loop.submit(Request(str(index), (3,), max_new_tokens=10), ear)
    assert all(ear.done.wait(10) for ear in ears)
    loop.stop()
    assert [[event.token for event in ear.events] for ear in ears] == [list(range(10))] * 5
    assert engine.widest == 2


def test_a_request_that_does_not_fit_harms_no_other() -> None:
    loop = EngineLoop(CountingEngine())
    good, bad = Ear(), Ear()
    loop.submit(Request("good", (3,), max_new_tokens=10), good)
    loop.submit(Request("bad", (13,), max_new_tokens=10), bad)
    assert good.done.wait(10)
    assert bad.done.wait(10)
    loop.stop()
    assert isinstance(bad.events[0], UserError)
    assert len(good.events) == 10


def test_every_client_hears_of_a_broken_engine() -> None:
    loop = EngineLoop(CountingEngine())
    running, breaking, later = Ear(), Ear(), Ear()
    loop.submit(Request("running", (3,), max_new_tokens=10**9), running)
    loop.submit(Request("breaking", (14,), max_new_tokens=10), breaking)
    assert running.done.wait(10)
    assert breaking.done.wait(10)
    loop.submit(Request("later", (3,), max_new_tokens=1), later)
    assert later.done.wait(10)
    loop.stop()
    assert str(running.events[-1]) == str(breaking.events[-1]) == "the device is gone"
    assert str(later.events[-1]) == "the engine stopped (the device is gone): restart the server"


def test_a_cancelled_request_leaves_the_engine() -> None:
    engine = CountingEngine()
    loop = EngineLoop(engine)
    endless, after = Ear(), Ear()
    loop.submit(Request("endless", (3,), max_new_tokens=10**9), endless)
    while not endless.events:
        time.sleep(0.001)
    loop.cancel("endless")
    loop.submit(Request("after", (3,), max_new_tokens=1), after)
    assert after.done.wait(10)
    heard = len(endless.events)
    time.sleep(0.05)
    loop.stop()
    assert not engine.busy
    assert len(endless.events) == heard


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    """As much of an engine directory as writing a repository reads."""
    directory = tmp_path / "build" / "engine"
    directory.mkdir(parents=True)
    (directory / "engine.json").write_text(json.dumps({"backend": "torch", "max_batch_size": 8}))
    return directory


def test_the_repository_names_its_engine_so_that_a_build_can_move(engine_dir: Path, tmp_path: Path) -> None:
    write_repository(engine_dir, engine_dir.parent / "triton", DeployConfig())
    assert '"../../engine"' in (engine_dir.parent / "triton" / "llm" / "config.pbtxt").read_text()
    write_repository(engine_dir, tmp_path / "elsewhere" / "triton", DeployConfig())
    assert f'"{engine_dir}"' in (tmp_path / "elsewhere" / "triton" / "llm" / "config.pbtxt").read_text()


def test_options_reach_the_configuration(engine_dir: Path) -> None:
    out = engine_dir.parent / "triton"
    write_repository(engine_dir, out, DeployConfig())
    plain = (out / "llm" / "config.pbtxt").read_text()
    assert "decoupled: true" in plain
    assert "max_batch_size: 0" in plain
    assert "response_cache" not in plain
    write_repository(engine_dir, out, DeployConfig(response_cache=True, dynamic_batching=True))
    cached = (out / "llm" / "config.pbtxt").read_text()
    assert "decoupled" not in cached
    assert "max_batch_size: 8" in cached
    assert "response_cache { enable: true }" in cached
    assert "dynamic_batching {" in cached
    assert sorted(path.name for path in out.iterdir()) == ["llm"]


def test_streaming_and_the_response_cache_exclude_each_other(engine_dir: Path) -> None:
    with pytest.raises(UserError, match="cannot cache the responses of a streaming"):
        write_repository(engine_dir, engine_dir.parent / "triton", DeployConfig(streaming=True, response_cache=True))
    assert not (engine_dir.parent / "triton").exists()


def test_what_is_no_engine_is_refused(engine_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'.*/nowhere' is not an engine directory"):
        write_repository(tmp_path / "nowhere", tmp_path / "triton", DeployConfig())
    (engine_dir / "engine.json").write_text('{"backend": "abacus"}')
    with pytest.raises(UserError, match=r"foreign engine.json \(backend 'abacus'\)"):
        write_repository(engine_dir, tmp_path / "triton", DeployConfig())


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", 'a"'])
def test_a_model_name_that_no_url_can_hold_is_refused(engine_dir: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot name a model"):
        write_repository(engine_dir, engine_dir.parent / "triton", DeployConfig(model_name=name))
    assert not (engine_dir.parent / "triton").exists()


def test_another_directory_in_the_way_is_kept(engine_dir: Path) -> None:
    precious = engine_dir.parent / "triton" / "llm" / "notes.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    with pytest.raises(UserError, match="something other than a Triton model"):
        write_repository(engine_dir, engine_dir.parent / "triton", DeployConfig())
    assert precious.read_text() == "mine"


def test_a_port_in_use_is_named(engine_dir: Path) -> None:
    import socket

    out = engine_dir.parent / "triton"
    write_repository(engine_dir, out, DeployConfig())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"grpc port {port} on 127.0.0.1 cannot be used .* --grpc-port"),
            Server(out, Ports(*(Ports.free().http, port, Ports.free().metrics))),
        ):
            pass


def test_a_python_without_its_shared_library_is_told_what_to_install(tmp_path: Path) -> None:
    stub = tmp_path / "stubs" / "triton_python_backend_stub"
    stub.parent.mkdir()
    stub.write_text("#!/bin/sh\necho 'stub: error while loading shared libraries: libpython3.so: gone' >&2\nexit 127\n")
    stub.chmod(0o755)
    wheel = Installation(tmp_path / "tritonserver", tmp_path, tmp_path, libraries=tmp_path, stubs=stub.parent)
    with pytest.raises(UserError, match=r"cannot start \(libpython3.so: gone\): install libpython3"):
        lay_out(wheel, tmp_path / "scratch")


def test_an_empty_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model in"), Server(tmp_path, Ports.free()):
        pass
