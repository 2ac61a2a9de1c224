"""Prices of channels, what is chosen by them, and the search under a budget."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from calibration.budget.allocation import Allocation, Allocator, allocator
from calibration.budget.budget_search import search
from calibration.budget.channel_prices import channel_prices, prune_each_alone
from calibration.config import Budget
from calibration.data.windows import windows
from calibration.evaluation.answer_loss import Answers
from calibration.evaluation.evaluate import evaluate, hf_logits
from calibration.model.blocks import Blocks
from calibration.model.silence import suppress_output
from plugins.common.errors import GateError, UserError

LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
BLOCKS = 2
CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=512, num_hidden_layers=BLOCKS, num_attention_heads=8, num_key_value_heads=4,
    head_dim=32, vocab_size=64,
)  # fmt: skip
LAYERS = [f"model.layers.{block}.{linear}" for block in range(BLOCKS) for linear in LINEARS]


def quietly(*_: object) -> None: ...


# prices


@pytest.fixture(scope="module")
def cut(docs_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """docs-llama's first two blocks."""
    out = tmp_path_factory.mktemp("cut")
    with suppress_output():
        AutoModelForCausalLM.from_pretrained(docs_llama, num_hidden_layers=BLOCKS).float().save_pretrained(out)
    return out


def test_the_prices_of_a_half_are_its_measured_kl(cut: Path, docs_llama: Path, tmp_path: Path) -> None:
    tokens = windows(str(docs_llama / "evaluation.jsonl"), docs_llama, 96, 24).tokens
    blocks = Blocks(cut)
    pruned = prune_each_alone(blocks, tokens, LAYERS, "2:4", tmp_path, quietly)
    dense, model = (AutoModelForCausalLM.from_pretrained(cut).eval() for _ in range(2))
    prices = channel_prices(model, pruned, tokens, quietly)
    assert {len(prices[f"model.layers.0.{half}"]) for half in ("mlp", "self_attn")} == {768, 2}
    for half in ("model.layers.0.mlp", "model.layers.1.mlp", "model.layers.1.self_attn"):
        kept = {name: model.get_submodule(name).weight.data for name in pruned if name.startswith(half)}
        for name in kept:
            model.get_submodule(name).weight.data = pruned[name]
        measured = evaluate(hf_logits(dense), hf_logits(model), tokens).kl
        for name, weight in kept.items():
            model.get_submodule(name).weight.data = weight
        assert 0.6 < sum(prices[half]) / measured < 1.7, half


def test_cheap_channels_cost_less_than_dear_ones(cut: Path, docs_llama: Path, tmp_path: Path) -> None:
    tokens = windows(str(docs_llama / "evaluation.jsonl"), docs_llama, 96, 24).tokens
    pruned = prune_each_alone(Blocks(cut), tokens, LAYERS, "2:4", tmp_path, quietly)
    dense, model = (AutoModelForCausalLM.from_pretrained(cut).eval() for _ in range(2))
    half = "model.layers.1.mlp"
    order = np.argsort(channel_prices(model, pruned, tokens, quietly)[half])

    def kl(channels: np.ndarray) -> float:
        for name in ("gate_proj", "up_proj"):
            weight = dense.get_submodule(f"{half}.{name}").weight.data.clone()
            weight[channels] = pruned[f"{half}.{name}"][channels]
            model.get_submodule(f"{half}.{name}").weight.data = weight
        return evaluate(hf_logits(dense), hf_logits(model), tokens).kl

    assert kl(order[:384].copy()) < 0.5 * kl(order[384:].copy())


# allocation


def made_up(
    ranks: int = 1, layers: list[str] = LAYERS, seed: int = 0, whole_layers: bool = False, second: float = 0.0
) -> Allocator:
    """Everything 2:4 costs about a nat. `second`: the share of a layer's gain that its second product takes."""
    random = np.random.default_rng(seed)
    keys = [*LAYERS, *(f"model.layers.{block}.{half}" for block in range(BLOCKS) for half in ("mlp", "self_attn"))]
    prices = {key: random.exponential(1e-3, size=512 if ".mlp" in key else 4).tolist() for key in keys}
    rows = {"q": 256, "k": 128, "v": 128, "o": 256, "g": 512, "u": 512, "d": 512}
    weights = {name: 64 * rows[name.rpartition(".")[2][0]] for name in layers}
    second_products = {name: second * gain for name, gain in weights.items()}
    return allocator(CONFIG, prices, layers, weights, weights, ranks, whole_layers, second_products)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("fraction", [0.25, 0.5, 0.75, 1.0])
def test_a_fraction_is_met_and_every_rank_holds_its_share(fraction: float, ranks: int) -> None:
    chosen = made_up(ranks)
    allocation = chosen.of_fraction(fraction)
    assert allocation.fraction == pytest.approx(fraction, abs=0.04)
    declared = chosen.declare(allocation, "sparsegpt")
    for name, segments in declared.hybrid.items():
        assert segments.axis == ("inputs" if name.endswith(("o_proj", "down_proj")) else "rows")
        assert segments.rank(0, ranks) == segments.rank(ranks - 1, ranks)
    for order in declared.order.values():
        assert sorted(order) == list(range(len(order)))
    if fraction == 1:
        assert set(declared.layers) == set(LAYERS)
        assert not declared.hybrid
        assert not declared.order


@pytest.mark.parametrize("second", [0.0, 0.2, 0.6, 2.0])
def test_a_second_product_must_pay_for_itself(second: float) -> None:
    """No share of a unit goes 2:4 that saves less than its second product takes; a unit as a whole has none."""
    chosen = made_up(second=second)
    assert all(step.gain > 0 for step in chosen.steps)
    for number, unit in enumerate(chosen.units):
        steps = [step for step in chosen.steps if step.unit == number]
        assert sum(step.gain for step in steps) == pytest.approx(unit.gain)
        assert sum(step.cost for step in steps) == pytest.approx(sum(unit.prices))
        assert all(step.count / len(unit.prices) > min(second, 0.99) for step in steps[:1])
    for fraction in (0.3, 0.6):
        declared = chosen.declare(chosen.of_fraction(fraction), "sparsegpt")
        assert all(segments.fraction > second for segments in declared.hybrid.values())


def test_a_backend_without_hybrid_kernels_gets_whole_layers() -> None:
    chosen = made_up(whole_layers=True)
    allocation = chosen.of_fraction(0.5)
    declared = chosen.declare(allocation, "sparsegpt")
    assert allocation.fraction == pytest.approx(0.5, abs=0.1)
    assert 0 < len(declared.layers) < len(LAYERS)
    assert (declared.hybrid, declared.order) == ({}, {})


def test_the_cheapest_channels_go_first_and_rising_budgets_nest() -> None:
    chosen = made_up()
    unit = next(unit for unit in chosen.units if unit.half.endswith("0.mlp"))
    assert list(unit.prices) == sorted(unit.prices)
    total = sum(step.cost for step in chosen.steps)
    allocations = [chosen.within(total * share) for share in (0.05, 0.2, 0.5, 1.01)]
    assert all(each.cost <= total * share for each, share in zip(allocations, (0.05, 0.2, 0.5, 1.01), strict=True))
    assert [each.gain for each in allocations] == sorted(each.gain for each in allocations)
    assert allocations[-1].fraction == 1


def test_no_other_choice_of_steps_gains_more_for_the_same_cost() -> None:
    chosen = made_up(layers=[name for name in LAYERS if "self_attn" in name][:4])
    for share in (0.2, 0.4, 0.6):
        actual = chosen.within(share * sum(step.cost for step in chosen.steps))
        best = 0.0
        for counts in itertools.product(*(unit.counts() for unit in chosen.units)):
            units = list(zip(chosen.units, counts, strict=True))
            if sum(sum(unit.prices[:count]) for unit, count in units) <= actual.cost:
                best = max(best, sum(unit.gain * count / len(unit.prices) for unit, count in units))
        assert actual.gain == pytest.approx(best)


def test_a_fraction_below_one_step_leaves_everything_dense() -> None:
    chosen = made_up()
    assert chosen.declare(chosen.of_fraction(0.001), "sparsegpt").pruned == ()


def test_layers_that_are_no_candidates_stay_dense() -> None:
    chosen = made_up(layers=[name for name in LAYERS if not name.endswith(("down_proj", "v_proj"))])
    declared = chosen.declare(chosen.of_fraction(0.5), "sparsegpt")
    assert declared.pruned
    assert not any(name.endswith(("down_proj", "v_proj")) for name in declared.pruned)


# the search


ANSWERS = Answers([True] * 80 + [False] * 20, [[margin / 40, 3.0] for margin in range(80)])


def accuracy(kl: float) -> dict[str, float]:
    changed = max(kl, 0) ** 0.5
    lost = ANSWERS.predicted_loss(kl)
    return {"perplexity_increase": math.expm1(kl), "kl": kl, "top1_agreement": 1 - changed, "exact_match_loss": lost}


class Builds:
    """Builds that lose `share` times what is predicted."""

    def __init__(self, share: float):
        self.share, self.made = share, list[Allocation]()

    def __call__(self, allocation: Allocation) -> dict[str, float]:
        self.made.append(allocation)
        return accuracy(self.share * allocation.cost)


@pytest.mark.parametrize(
    "limit",
    [
        {"perplexity_increase": 0.2},
        {"kl": 0.2},
        {"top1_agreement": 0.6},
        {"exact_match_loss": 0.2, "questions": "questions.jsonl"},
    ],
)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.8])
def test_two_builds_end_within_the_budget_and_use_most_of_it(limit: dict[str, Any], share: float) -> None:
    builds = Builds(share)
    actual = search(made_up(), Budget(**limit), "reconstruct", builds, ANSWERS if "questions" in limit else None)
    assert len(builds.made) <= 2
    loss = {"top1_agreement": 0.4}.get(next(iter(limit)), 0.2)
    assert actual.measured_loss <= loss
    assert actual.measured_loss > 0.6 * loss or actual.allocation.fraction > 0.99
    assert next(point for point in actual.pareto if point["chosen"])["measured"]


@pytest.mark.parametrize("chance", [-0.02, 0.0])
def test_answers_that_none_lost_by_chance_are_no_room_for_more(chance: float) -> None:
    """The second build takes the measured KL for a measure, not the answers that did not happen to change."""
    made: list[Allocation] = []

    def measure(allocation: Allocation) -> dict[str, float]:
        made.append(allocation)
        return accuracy(0.5 * allocation.cost) | {"exact_match_loss": chance}

    limit = Budget(exact_match_loss=0.05, questions="questions.jsonl")
    actual = search(made_up(), limit, "reconstruct", measure, ANSWERS)
    assert ANSWERS.predicted_loss(0.5 * actual.allocation.cost) <= 0.05
    assert len(made) == 1


def test_what_nothing_meets_names_the_smallest_loss() -> None:
    with pytest.raises(GateError, match=r"nothing fits under sparsity.budget \(perplexity \+1.00%\): .* perplexity \+"):
        search(made_up(), Budget(perplexity_increase=0.01), "reconstruct", lambda _: accuracy(0.5))


def test_a_budget_of_nothing_takes_what_costs_nothing() -> None:
    actual = search(made_up(), Budget(perplexity_increase=0), "reconstruct", lambda _: accuracy(-0.001))
    assert actual.measured_loss < 0


def test_a_first_build_that_took_long_ends_the_search() -> None:
    builds = Builds(0.01)
    search(made_up(), Budget(perplexity_increase=0.2, minutes=1e-9), "reconstruct", builds)
    assert len(builds.made) == 1


def test_layers_that_save_no_time_are_refused() -> None:
    with pytest.raises(UserError, match="no layer would save time"):
        search(Allocator([], {}), Budget(kl=0.1), "reconstruct", Builds(1.0))
