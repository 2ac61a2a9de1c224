"""The torch engine as its users see it: the same tokens alone, in any batch, and from transformers itself."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers

from builder.engines.torch_backend import artifact
from builder.engines.torch_backend.artifact import TorchEngine
from builder.engines.torch_backend.cuda_graphs import DecodeSteps
from builder.planning.kv_capacity import BLOCK
from plugins.common.errors import UserError
from plugins.common.request import Request, Token
from tests.support.torch_models import FAMILIES, make_model, prompt

WINDOWED = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}


def collect(engine: TorchEngine, requests: list[Request]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for token in engine.generate(requests):
        tokens.setdefault(token.request_id, []).append(token.token)
    return tokens


def requests_of_all_kinds(count: int) -> list[Request]:
    """Prompts of 1 to 20 tokens, 1 to 12 new ones, greedy and sampled."""
    kinds = [{}, {"temperature": 0.8, "seed": 5}, {"temperature": 1.5, "top_k": 7}, {"temperature": 1.0, "top_p": 0.7}]
    return [
        Request(f"r{i}", prompt(1 + 7 * i % 20, seed=i), 1 + 5 * i % 12, ignore_eos=i % 2 == 0, **kinds[i % 4])
        for i in range(count)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_family_computes_as_transformers_does(family: str, tmp_path: Path) -> None:
    """Logits of whole sequences, and greedy tokens through prefill, cache and batched decode, in float64."""
    model = make_model(family, tmp_path).double()
    engine = artifact.load_hf(tmp_path, dtype=torch.float64)
    ids = torch.tensor([prompt(20, 1), prompt(20, 2)])
    with torch.inference_mode():
        torch.testing.assert_close(engine.logits(ids), model(ids).logits.float(), rtol=1e-4, atol=1e-4)
    requests = [Request(str(n), prompt(n, seed=n), 15, ignore_eos=True) for n in (1, 4, 11, 30)]
    tokens = collect(engine, requests)
    for request in requests:
        start = torch.tensor([request.input_ids])
        with torch.inference_mode():
            whole = model.generate(start, max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert tokens[request.id] == whole[0, start.shape[1] :].tolist()


def test_dense_model_generates_what_transformers_does(docs_llama: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(docs_llama, dtype=torch.float32)
    engine = artifact.load_hf(docs_llama, dtype=torch.float32)
    start = tuple(range(300, 340))
    with torch.inference_mode():
        whole = model.generate(torch.tensor([start]), max_new_tokens=40, do_sample=False)
    assert collect(engine, [Request("a", start, 40)])["a"] == whole[0, len(start) :].tolist()


@pytest.mark.parametrize("chunked", [False, True])
def test_tokens_do_not_depend_on_the_batch(tiny: Path, chunked: bool) -> None:
    """Few rows, few tokens a prefill, requests that come and go: each gets what it gets alone."""
    requests = requests_of_all_kinds(17)
    wide = artifact.load_hf(tiny, dtype=torch.float64)
    alone = {request.id: collect(wide, [request])[request.id] for request in requests}
    tight = {"max_batch_size": 3, "max_num_tokens": 6 if chunked else 20, "chunked_prefill": chunked}
    crowded = artifact.load_hf(tiny, dtype=torch.float64, **tight)
    assert collect(crowded, requests) == alone
    assert collect(wide, requests) == alone
    assert not crowded.busy


@pytest.fixture(scope="module")
def long(tiny: Path) -> Path:
    """`tiny` with positions for several blocks of the KV cache."""
    out = tiny.parent / "long"
    shutil.copytree(tiny, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4 * BLOCK}))
    return out


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_preemption_changes_no_token(long: Path, chunked: bool, reuse: bool) -> None:
    """Five sequences of up to 3 blocks share 4 blocks."""
    requests = [Request(str(i), prompt(BLOCK - 20 + 9 * i, seed=i), BLOCK + 20, ignore_eos=True) for i in range(5)]
    limits = {"max_batch_size": 4, "max_seq_len": 3 * BLOCK, "chunked_prefill": chunked, "max_num_tokens": 2 * BLOCK}
    roomy = artifact.load_hf(long, dtype=torch.float64, **limits)
    each = roomy.describe()["kv_cache_bytes"] // (4 * 3 + 1)  # a block; one more takes what padded rows write
    tight = artifact.load_hf(long, dtype=torch.float64, **limits, kv_cache_memory=4 * each, kv_cache_block_reuse=reuse)
    assert tight.describe()["kv_cache_tokens"] == 4 * BLOCK
    assert collect(tight, requests) == collect(roomy, requests)
    assert tight.describe()["preemptions"] > 0
    assert tight.describe()["kv_cache_blocks_used"] == roomy.describe()["preemptions"] == 0


@pytest.mark.parametrize("graphs", [False, True])
def test_a_prefix_read_from_the_cache_changes_no_token(long: Path, graphs: bool) -> None:
    """Of six prompts two begin with a block that lies in the cache when they start; one token is always computed."""
    whole = prompt(BLOCK + 8)
    prompts = [whole, (*whole[: BLOCK + 3], 7, 8), whole[:BLOCK], whole[: BLOCK + 1], prompt(20, seed=3), whole]
    requests = [Request(str(i), p, 20, ignore_eos=True) for i, p in enumerate(prompts)]
    tokens, reused = [], []
    for reuse in (True, False):
        engine = artifact.load_hf(long, dtype=torch.float64, max_batch_size=2, kv_cache_block_reuse=reuse)
        if graphs:
            engine._graphs = DecodeSteps(engine.model, engine._cache, 2, 4 * BLOCK)
        tokens.append(collect(engine, requests))
        reused.append(engine.describe()["kv_cache_reused_tokens"])
        assert engine.describe()["kv_cache_blocks_used"] == 0
    assert tokens[0] == tokens[1]
    assert reused[0] == 2 * BLOCK
    assert reused[1] == 0


def test_requests_may_join_while_others_run(tiny: Path) -> None:
    requests = requests_of_all_kinds(9)
    engine = artifact.load_hf(tiny, dtype=torch.float64, max_batch_size=4)
    alone = {request.id: collect(engine, [request])[request.id] for request in requests}
    waiting, tokens = list(requests), []
    while waiting or engine.busy:
        if waiting:
            engine.add(waiting.pop())
        tokens += engine.step()
    joined: dict[str, list[int]] = {}
    for token in tokens:
        joined.setdefault(token.request_id, []).append(token.token)
    assert joined == alone


@pytest.mark.parametrize("budget", [4, 60])
def test_decode_steps_of_fixed_shape_change_no_token(tiny: Path, budget: int) -> None:
    """What CUDA graphs replay, here without the graph: padded rows beside a half prefilled prompt, rounded lengths."""
    requests = requests_of_all_kinds(13)
    settings = {"max_batch_size": 5, "max_num_tokens": budget, "chunked_prefill": True}
    engine = artifact.load_hf(tiny, dtype=torch.float64, **settings)
    expected = collect(engine, requests)
    engine._graphs = DecodeSteps(engine.model, engine._cache, 5, 64)
    assert collect(engine, requests) == expected
    assert {rows for rows, _ in engine._graphs._steps} == ({1, 2, 4} if budget == 4 else {1, 2, 4, 5})


@pytest.mark.gpu
def test_cuda_graphs_change_no_token(tiny: Path) -> None:
    requests = requests_of_all_kinds(13)
    tokens = []
    for cuda_graphs in (True, False):
        engine = artifact.load_hf(tiny, device="cuda", dtype=torch.float64, max_batch_size=5, cuda_graphs=cuda_graphs)
        tokens.append(collect(engine, requests))
    assert tokens[0] == tokens[1]


def test_tokens_are_numbered_timed_and_ended(tiny: Path) -> None:
    engine = artifact.load_hf(tiny)
    tokens: list[Token] = list(engine.generate([Request("a", prompt(3), 5, ignore_eos=True)]))
    assert [token.index for token in tokens] == [0, 1, 2, 3, 4]
    assert [token.last for token in tokens] == [False] * 4 + [True]
    assert all(a.time < b.time for a, b in pairwise(tokens))


def test_eos_ends_a_request_unless_ignored(tiny: Path) -> None:
    engine = artifact.load_hf(tiny)
    free = collect(engine, [Request("a", prompt(3), 9, ignore_eos=True)])["a"]
    engine.eos = frozenset({free[4]})
    stopped = free[: free.index(free[4]) + 1]
    assert collect(engine, [Request("a", prompt(3), 9)])["a"] == stopped
    assert collect(engine, [Request("a", prompt(3), 9, ignore_eos=True)])["a"] == free


def test_a_cancelled_request_leaves_the_others_alone(tiny: Path) -> None:
    engine = artifact.load_hf(tiny, dtype=torch.float64, max_batch_size=3)
    requests = [Request(str(i), prompt(5 + i, seed=i), 10, ignore_eos=True) for i in range(5)]
    alone = {request.id: collect(engine, [request])[request.id] for request in requests}
    for request in requests:
        engine.add(request)
    tokens = engine.step() + engine.step()
    for name in ("0", "4", "unknown"):  # one running in the first row, one waiting, one never seen
        engine.cancel(name)
    while engine.busy:
        tokens += engine.step()
    for name in ("1", "2", "3"):
        assert [token.token for token in tokens if token.request_id == name] == alone[name]
    assert not [token for token in tokens if token.request_id == "4"]


def test_an_abandoned_generation_leaves_nothing_behind(tiny: Path) -> None:
    engine = artifact.load_hf(tiny)
    for _ in engine.generate(requests_of_all_kinds(4)):
        break
    assert not engine.busy


@pytest.mark.parametrize(
    ("request_", "fragment"),
    [
        (Request("x", (), 1), "has no tokens"),
        (Request("x", (5,), 0), "requests 0 tokens"),
        (Request("x", (5,) * 60, 5), "60 \\+ 5 tokens, more than max_seq_len 64"),
        (Request("x", (5,) * 30, 5), "30 tokens, more than max_num_tokens 20"),
        (Request("x", (5, 96), 5), "outside 0 to 95"),
        (Request("x", (5, -1), 5), "outside 0 to 95"),
        (Request("x", (5,), 5, temperature=-1), "temperature -1"),
        (Request("x", (5,), 5, temperature=float("nan")), "temperature nan"),
        (Request("x", (5,), 5, top_p=0), "top_p 0"),
        (Request("taken", (5,), 5), "a unique id"),
    ],
)
def test_a_request_that_cannot_run_is_refused(tiny: Path, request_: Request, fragment: str) -> None:
    engine = artifact.load_hf(tiny, max_num_tokens=20)
    engine.add(Request("taken", (5,), 5))
    with pytest.raises(UserError, match=fragment) as error:
        engine.add(request_)
    assert f"'{request_.id}'" in str(error.value)
    assert "\n" not in str(error.value)


def test_logits_past_max_seq_len_are_refused(tiny: Path) -> None:
    with pytest.raises(UserError, match="65 tokens exceeds max_seq_len 64"):
        artifact.load_hf(tiny).logits(torch.zeros(1, 65, dtype=torch.int64))
