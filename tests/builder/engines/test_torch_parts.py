"""The torch engine's parts on their own: who runs when and where, which token is drawn, what an 8-bit cache holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.engines.request import Request
from builder.engines.torch_backend.kv_cache import KVCache
from builder.engines.torch_backend.sampling import sample
from builder.engines.torch_backend.scheduler import Move, Scheduler


class Simulation:
    """Runs a scheduler against a cache that remembers whose token lies where."""

    def __init__(self, rows: int, tokens: int, chunked: bool) -> None:
        self.scheduler = Scheduler(rows, tokens, chunked)
        self.rows, self.tokens, self.chunked = rows, tokens, chunked
        self.cache: list[list[tuple[str, int] | None]] = [[None] * 64 for _ in range(rows)]
        self.generated: dict[str, int] = {}
        self.finished: list[str] = []

    def move(self, moves: list[Move]) -> None:
        for move in moves:
            self.cache[move.target][: move.length] = self.cache[move.source][: move.length]

    def step(self) -> None:
        running = list(self.scheduler.running)
        produced = self.prefill(taken=len(running))
        for row, sequence in enumerate(running):
            assert sequence.row == row, "decode reads rows 0 to B - 1"
            name = sequence.request.id
            assert self.cache[row][: sequence.cached] == [(name, i) for i in range(sequence.cached)]
            self.cache[row][sequence.cached] = (name, sequence.cached)
            sequence.cached += 1
            produced.append(sequence)
        ended = set()
        for sequence in produced:
            name = sequence.request.id
            self.generated[name] = self.generated.get(name, 0) + 1
            if self.generated[name] == sequence.request.max_new_tokens:
                ended.add(name)
                self.finished.append(name)
        self.move(self.scheduler.finish(ended))

    def prefill(self, taken: int) -> list:
        slices = self.scheduler.prefill()
        assert sum(part.length for _, part in slices) <= self.tokens
        for sequence, part in slices:
            assert taken <= part.row < self.rows
            assert self.chunked or part.length == len(sequence.request.input_ids)
            name, end = sequence.request.id, part.start + part.length
            assert self.cache[part.row][: part.start] == [(name, i) for i in range(part.start)], "earlier slices stay"
            self.cache[part.row][part.start : end] = [(name, i) for i in range(part.start, end)]
        return [sequence for sequence, _ in slices if sequence.prefilled]


@given(st.data(), st.integers(1, 4), st.booleans())
@settings(max_examples=200, deadline=None)
def test_every_request_ends_and_no_row_is_mixed_up(data: st.DataObject, rows: int, chunked: bool) -> None:
    simulation = Simulation(rows, 9, chunked)
    added, cancelled = 0, set()
    for action in data.draw(st.lists(st.sampled_from(["add", "step", "step", "cancel"]), max_size=40)):
        if action == "add":
            length = data.draw(st.integers(1, 20 if chunked else 9))
            simulation.scheduler.add(Request(str(added), (1,) * length, data.draw(st.integers(1, 6))))
            added += 1
        elif action == "step":
            simulation.step()
        elif added:
            name = str(data.draw(st.integers(0, added - 1)))
            cancelled.add(name)
            simulation.move(simulation.scheduler.cancel(name))
    for _ in range(40 * 20):
        if not simulation.scheduler.busy:
            break
        simulation.step()
    assert not simulation.scheduler.busy
    assert {str(i) for i in range(added)} - cancelled <= set(simulation.finished)
    assert len(set(simulation.finished)) == len(simulation.finished)


def test_requests_start_in_order() -> None:
    simulation = Simulation(rows=2, tokens=9, chunked=False)
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
@settings(max_examples=30, deadline=None)
def test_a_draw_is_the_same_in_any_batch(seed: int, index: int) -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed))
    kinds = [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 3}, {"temperature": 1.0, "top_p": 0.4}, {}]
    requests = [Request(str(i), (1,), 1, seed=seed, **kind) for i, kind in enumerate(kinds)]
    together = sample(logits, requests, [index] * 5)
    assert together == [sample(logits[i : i + 1], requests[i : i + 1], [index])[0] for i in range(5)]
    assert together[0] == logits[0].argmax()


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
    cache = KVCache([(scale, 2 * scale)], 2, 3, 5, 8, kind=kind, dtype=torch.float32, device=torch.device("cpu"))
    stored = cache.store(0, x, x)
    assert all(tensor.element_size() == 1 for tensor in stored)
    assert cache.nbytes == 2 * 2 * 3 * 5 * 8
    for tensor, factor in zip(stored, cache.scales[0], strict=True):
        back = cache.load(tensor) * factor
        step = factor / 2 if kind == "int8" else x.abs() / 16 + factor * 2**-10
        assert ((back - x).abs() <= step * 1.001).all()


def test_moving_a_row_copies_its_tokens_only() -> None:
    cache = KVCache([(1.0, 1.0)], 2, 1, 4, 2, kind="none", dtype=torch.float32, device=torch.device("cpu"))
    cache.keys[0][1], cache.values[0][1] = 5, 7
    cache.move(1, 0, 3)
    assert cache.keys[0][0, 0, :, 0].tolist() == [5, 5, 5, 0]
    assert cache.values[0][0, 0, :, 1].tolist() == [7, 7, 7, 0]
