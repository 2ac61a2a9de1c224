"""Eviction from the KV cache: what stays, and that a budget that is never reached changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from builder.engines.torch_backend import artifact
from builder.engines.torch_backend.artifact import TorchEngine
from builder.engines.torch_backend.eviction import attend, heaviest
from builder.planning.kv_capacity import BLOCK
from plugins.common.errors import UserError
from plugins.common.request import Request
from tests.support.torch_models import make_model, prompt

BUDGET = 4 * BLOCK
LENGTH = 8 * BLOCK


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose attention differs from token to token, with positions for twice the budget."""
    out = tmp_path_factory.mktemp("eviction") / "model"
    make_model("qwen3", out)
    config = json.loads((out / "config.json").read_text())
    config["rope_parameters"]["original_max_position_embeddings"] = LENGTH // 2
    (out / "config.json").write_text(json.dumps(config | {"max_position_embeddings": LENGTH}))
    return out


def opened(model: Path, budget: int | None, **settings: int | bool) -> TorchEngine:
    settings = {"max_batch_size": 3, "kv_cache_block_reuse": False} | settings
    return artifact.load_hf(model, dtype=torch.float64, kv_cache_budget=budget, **settings)


def generated(engine: TorchEngine, lengths: tuple[int, ...], new: int) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {str(length): [] for length in lengths}
    for token in engine.generate([Request(str(n), prompt(n, seed=n), new, ignore_eos=True) for n in lengths]):
        tokens[token.request_id].append(token.token)
    return tokens


@pytest.mark.parametrize("chunked", [False, True])
def test_a_budget_of_the_whole_context_changes_no_token(model: Path, chunked: bool) -> None:
    lengths, settings = (BUDGET // 2, 5, BUDGET - 40), {"chunked_prefill": chunked, "max_num_tokens": BUDGET}
    expected = generated(opened(model, None, **settings), lengths, 40)
    assert generated(opened(model, BUDGET, **settings), lengths, 40) == expected


@pytest.mark.slow
def test_decoding_sees_what_evaluation_sees(model: Path) -> None:
    """Three sequences pass the budget at different times, each several times; the last is a prompt past half of it."""
    engine, lengths, new = opened(model, BUDGET), (BUDGET // 2, 20, BUDGET), LENGTH - BUDGET
    tokens = generated(engine, lengths, new)
    assert tokens != generated(opened(model, None), lengths, new)
    for length in lengths:
        ids = torch.tensor([[*prompt(length, seed=length), *tokens[str(length)]]])
        assert engine.logits(ids)[0, length - 1 : -1].argmax(-1).tolist() == tokens[str(length)]


def test_a_long_prompt_leaves_no_more_than_its_budget(model: Path) -> None:
    engine = opened(model, BUDGET, max_batch_size=1)
    engine.add(Request("a", prompt(LENGTH - 10), 10, ignore_eos=True))
    used = []
    while engine.busy:
        engine.step()
        used.append(engine.describe()["kv_cache_blocks_used"])
    assert used == [8, *[4] * 8, 0], "whole after the prompt, then the budget"


@pytest.mark.slow
def test_preemption_ends_and_gives_every_block_back(model: Path) -> None:
    engine = opened(model, BUDGET)
    each = engine.describe()["kv_cache_bytes"] * LENGTH // engine.describe()["kv_cache_tokens"]
    tight = opened(model, BUDGET, kv_cache_memory=each * 5 // 4)  # and the mass, in less than 10 blocks
    tokens = generated(tight, (40, 50, 60), BUDGET + BLOCK)
    assert all(len(answer) == BUDGET + BLOCK for answer in tokens.values())
    assert tight.describe()["preemptions"] > 0
    assert tight.describe()["kv_cache_blocks_used"] == 0


def test_the_first_the_newest_and_the_heaviest_stay() -> None:
    mass = torch.zeros(2, 20)
    mass[0, 7], mass[1, 6], mass[1, 9] = 3, 2, 1
    assert heaviest(mass, 10)[0].tolist()[:4] == [0, 1, 2, 3]
    assert 7 in heaviest(mass, 10)[0]
    assert heaviest(mass, 10)[0].tolist()[-5:] == [15, 16, 17, 18, 19]
    assert heaviest(mass, 11)[1].tolist() == [0, 1, 2, 3, 6, 9, 15, 16, 17, 18, 19]


def test_each_query_gives_away_a_mass_of_one_and_the_output_is_attention() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 300, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    out, mass = attend(q, k, v, torch.arange(300)[None], 0.3)
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, exact.transpose(1, 2))
    torch.testing.assert_close(mass.sum(-1), torch.full((2, 2), 600.0))
    assert (mass[:, :, :-1] > 0).all()


def test_a_sliding_window_and_a_budget_are_refused(tmp_path: Path) -> None:
    make_model("mistral", tmp_path)
    with pytest.raises(UserError, match="kv_cache_budget 256 evicts .* sliding_window 5"):
        artifact.load_hf(tmp_path, kv_cache_budget=256)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_caches_of_8_bit_evict_too(model: Path, kind: str) -> None:
    engine = opened(model, BUDGET)
    scales = [(0.05, 0.02)] * len(engine.model.blocks)
    engine.model.kv_scales = scales
    stored = TorchEngine(engine.model, engine.limits, engine.eos, kind)
    tokens = generated(stored, (20, BUDGET), 2 * BLOCK)
    for length in (20, BUDGET):
        ids = torch.tensor([[*prompt(length, seed=length), *tokens[str(length)]]])
        assert stored.logits(ids)[0, length - 1 : -1].argmax(-1).tolist() == tokens[str(length)]
