"""What serving is made of, without a server: requests, text, the engine's thread, the written repository."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from builder.deploy import request_schema
from builder.deploy.detokenizer import TextStream
from builder.deploy.engine_thread import EngineLoop
from builder.engines.base import Request, Token
from plugins.common.errors import UserError
from tests.support.examples import examples

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
    ("inputs", "fragment"),
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
def test_bad_input_is_quoted(inputs: dict[str, Any], fragment: str) -> None:
    with pytest.raises(UserError) as caught:
        ask(**inputs)
    assert fragment in str(caught.value)
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


@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
