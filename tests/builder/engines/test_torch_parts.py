"""The torch engine's parts on their own: who runs when and where, which token is drawn, what an 8-bit cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builder.engines.torch_backend.block_pool import BlockPool, pool_size
from builder.engines.torch_backend.kv_cache import KVCache
from builder.engines.torch_backend.limits import Limits
from builder.engines.torch_backend.sampling import sample
from builder.engines.torch_backend.scheduler import Scheduler
from builder.planning.kv_capacity import BLOCK
from plugins.common.errors import UserError
from plugins.common.request import Request
from tests.support.examples import examples


class Simulation:
    """Runs a scheduler against a cache that remembers the tokens that lie in its blocks."""

    def __init__(self, rows: int, tokens: int, chunked: bool, blocks: int) -> None:
        self.pool = BlockPool(blocks, reuse=True)
        self.scheduler = Scheduler(rows, tokens, chunked, self.pool)
        self.tokens, self.chunked = tokens, chunked
        self.cache: dict[int, list[int]] = {}
        self.finished: list[str] = []

    def put(self, blocks: Sequence[int], position: int, token: int) -> None:
        assert 0 not in blocks
        held = self.cache.setdefault(blocks[position // BLOCK], [-1] * BLOCK)
        held[position % BLOCK] = token

    def holds(self, blocks: Sequence[int], tokens: Sequence[int]) -> bool:
        return all(self.cache[blocks[i // BLOCK]][i % BLOCK] == token for i, token in enumerate(tokens))

    def step(self) -> None:
        running = self.scheduler.decode()
        produced = self.prefill()
        for sequence in running:
            context = sequence.context
            assert self.holds(sequence.blocks, context[: sequence.cached]), "its own tokens, in order"
            self.put(sequence.blocks, sequence.cached, context[sequence.cached])
            sequence.cached += 1
            produced.append(sequence)
        ended = set()
        for sequence in produced:
            name = sequence.request.id
            sequence.tokens.append(len(sequence.tokens) % 2)
            if len(sequence.tokens) == sequence.request.max_new_tokens:
                ended.add(name)
                self.finished.append(name)
        self.scheduler.finish(ended)

    def prefill(self) -> list:
        slices = self.scheduler.prefill()
        assert sum(part.length for _, part in slices) <= self.tokens
        for sequence, part in slices:
            assert part.length > 0
            context, end = sequence.context, part.start + part.length
            assert self.chunked or end == len(context) or len(context) > self.tokens
            assert self.holds(part.blocks, context[: part.start]), "earlier slices and shared blocks"
            for position in part.positions:
                self.put(part.blocks, position, context[position])
        return [sequence for sequence, _ in slices if sequence.prefilled]


@given(st.data(), st.integers(1, 4), st.integers(3, 12), st.booleans())
@examples(200)
def test_every_request_ends_and_no_block_is_mixed_up(
    data: st.DataObject, rows: int, blocks: int, chunked: bool
) -> None:
    simulation = Simulation(rows, 2 * BLOCK + 16, chunked, blocks)
    added, cancelled = 0, set()
    for action in data.draw(st.lists(st.sampled_from(["add", "step", "step", "cancel"]), max_size=40)):
        if action == "add":
            length = data.draw(st.integers(1, 2 * BLOCK + (26 if chunked else 16)))
            beginning = data.draw(st.integers(0, 2))
            simulation.scheduler.add(Request(str(added), (beginning,) * length, data.draw(st.integers(1, 6))))
            added += 1
        elif action == "step":
            simulation.step()
        elif added:
            name = str(data.draw(st.integers(0, added - 1)))
            cancelled.add(name)
            simulation.scheduler.cancel(name)
    for _ in range(40 * 20):
        if not simulation.scheduler.busy:
            break
        simulation.step()
    assert not simulation.scheduler.busy
    assert simulation.pool.used == 0
    assert {str(i) for i in range(added)} - cancelled <= set(simulation.finished)
    assert len(set(simulation.finished)) == len(simulation.finished)


def test_requests_start_in_order() -> None:
    simulation = Simulation(rows=2, tokens=9, chunked=False, blocks=2)
    for i, length in enumerate((9, 1, 1)):
        simulation.scheduler.add(Request(str(i), (1,) * length, 2))
    simulation.step()
    assert [s.request.id for s in simulation.scheduler.running] == ["0"], "a short prompt does not overtake"
    simulation.step()
    assert simulation.finished == ["0"]


def draws(logits: torch.Tensor, count: int, **settings: float) -> torch.Tensor:
    """How often each token is drawn over `count` seeds."""
    requests = [Request(str(i), (1,), 1, seed=i, **settings) for i in range(count)]
    tokens = sample(logits.expand(count, -1), requests, [0] * count)
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([1.0, 3.0, 0.0, 2.5])
    torch.testing.assert_close(draws(logits, 4000, temperature=1.0), logits.softmax(0), rtol=0, atol=0.03)
    torch.testing.assert_close(draws(logits, 4000, temperature=2.0), (logits / 2).softmax(0), rtol=0, atol=0.03)


def test_top_k_and_top_p_cut_the_tail() -> None:
    logits = torch.tensor([1.0, 3.0, 0.0, 2.5])  # probabilities 0.08, 0.56, 0.03, 0.34
    assert draws(logits, 300, temperature=5.0, top_k=2).nonzero().flatten().tolist() == [1, 3]
    assert draws(logits, 300, temperature=1.0, top_p=0.55).nonzero().flatten().tolist() == [1]
    assert draws(logits, 300, temperature=1.0, top_p=0.6).nonzero().flatten().tolist() == [1, 3]
    assert draws(logits, 300, temperature=9.0, top_k=1, top_p=1.0).nonzero().flatten().tolist() == [1]
    assert draws(logits, 300, temperature=9.0, top_k=99).nonzero().flatten().tolist() == [0, 1, 2, 3]


@given(st.integers(0, 2**31), st.integers(0, 50))
@examples(30)
def test_a_draw_is_the_same_in_any_batch(seed: int, index: int) -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed))
    kinds = [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 3}, {"temperature": 1.0, "top_p": 0.4}, {}]
    requests = [Request(str(i), (1,), 1, seed=seed, **kind) for i, kind in enumerate(kinds)]
    together = sample(logits, requests, [index] * 5)
    assert together == [sample(logits[i : i + 1], requests[i : i + 1], [index])[0] for i in range(5)]
    assert together[0] == logits[0].argmax()


def test_the_newest_frees_its_blocks_and_the_oldest_continues() -> None:
    simulation = Simulation(2, 4 * BLOCK, False, blocks=3)
    for name, prompt in (("old", (1,) * (BLOCK - 2)), ("new", (2,) * (BLOCK - 2))):
        simulation.scheduler.add(Request(name, prompt, BLOCK))
    while simulation.scheduler.busy:
        simulation.step()
    assert simulation.finished == ["old", "new"]
    assert simulation.scheduler.preemptions == 1


LIMITS = Limits(max_batch_size=4, max_seq_len=2 * BLOCK)


@pytest.mark.parametrize(("memory", "blocks"), [(None, 8), (1.0, 8), (5 * BLOCK, 5), (10**9, 8), (0.5, 6)])
def test_the_cache_takes_no_more_than_its_budget_and_no_more_than_it_can_use(
    memory: int | float | None, blocks: int
) -> None:
    free = 12 * BLOCK if memory == 0.5 else 10**6
    assert pool_size(replace(LIMITS, kv_cache_memory=memory), 1, free) == blocks


def test_a_budget_below_one_sequence_is_refused_with_one_that_fits() -> None:
    with pytest.raises(UserError, match=f"hold {BLOCK} tokens, fewer than engine.max_seq_len {2 * BLOCK}"):
        pool_size(replace(LIMITS, kv_cache_memory=2 * BLOCK - 1), 1, 10**9)
    with pytest.raises(UserError, match="kv_cache_memory=1MB or more"):
        pool_size(LIMITS, 1, 10)


def test_seed_and_index_change_the_draw() -> None:
    logits = torch.zeros(1, 10_000)

    def draw(seed: int, index: int) -> int:
        return sample(logits, [Request("a", (1,), 1, temperature=1.0, seed=seed)], [index])[0]

    assert draw(1, 1) == draw(1, 1)
    assert len({draw(seed, index) for seed in range(5) for index in range(5)}) == 25


@pytest.mark.parametrize(("kind", "steps"), [("int8", 127), ("fp8", 448)])
def test_an_8_bit_cache_holds_rounded_numbers(kind: str, steps: int) -> None:
    x = torch.randn(2, 3, 5, 8)
    scale = (x.abs().max() / steps).item()
    cache = KVCache([(scale, 2 * scale)], 2, 3, 8, kind=kind, dtype=torch.float32, device=torch.device("cpu"))
    stored = cache.store(0, x, x)
    assert all(tensor.element_size() == 1 for tensor in stored)
    assert cache.nbytes == 2 * (2 + 1) * 3 * BLOCK * 8
    for tensor, factor in zip(stored, cache.scales[0], strict=True):
        back = cache.load(tensor) * factor
        step = factor / 2 if kind == "int8" else x.abs() / 16 + factor * 2**-10
        assert ((back - x).abs() <= step * 1.001).all()
