"""The pruning methods on small layers, against the textbook and against exhaustive search."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from calibration.pruning.solvers import SOLVERS, Pattern, Statistics
from calibration.pruning.solvers.hessian import damped, inverse_factor
from calibration.pruning.solvers.reconstruct import refit
from calibration.pruning.solvers.sparsegpt import prune_in_turn, prune_together, sweep
from plugins.common.errors import UserError
from plugins.sparsity.segments import Segments
from tests.support.examples import examples

TWO_OF_FOUR = Pattern.parse("2:4")


def layer(out_features: int = 24, in_features: int = 64, tokens: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the second moments of correlated inputs, some of them much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator) / in_features**0.5
    scales = torch.exp(torch.randn(in_features, generator=generator))
    inputs = torch.randn(tokens, in_features, generator=generator) @ (torch.eye(in_features) + mixing) * scales
    return torch.randn(out_features, in_features, generator=generator), inputs.T @ inputs / tokens


def whole(weight: Tensor) -> Segments:
    return Segments.split("rows", len(weight), len(weight))


def statistics(hessian: Tensor) -> Statistics:
    """As from a first layer, where the dense model's inputs are the pruned model's."""
    return Statistics(hessian, hessian.clone())


def prune(method: str, weight: Tensor, hessian: Tensor, pattern: Pattern = TWO_OF_FOUR) -> Tensor:
    return SOLVERS[method]().prune("layer", weight, statistics(hessian), pattern, whole(weight))


def error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    return float(((weight - pruned) @ hessian * (weight - pruned)).sum())


def has_negative_zero(weight: Tensor) -> bool:
    return bool(((weight == 0) & weight.signbit()).any())


# patterns


@given(
    st.sampled_from([(1, 4), (2, 4), (3, 4), (4, 8), (1, 2)]),
    st.integers(1, 5),
    st.integers(1, 6),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-30]), min_size=1, max_size=20),
)
def test_a_mask_keeps_exactly_n_of_m_whatever_the_ties(nm, rows, groups, values) -> None:
    n, m = nm
    flat = torch.tensor(values).repeat(rows * groups * m)[: rows * groups * m]
    mask = Pattern.parse(f"{n}:{m}").select(flat.view(rows, groups * m))
    assert (mask.view(rows, groups, m).sum(2) == n).all()


def test_of_equal_scores_the_first_stay() -> None:
    assert TWO_OF_FOUR.select(torch.ones(1, 4)).tolist() == [[True, True, False, False]]


def test_an_unstructured_mask_keeps_the_share_over_the_whole_matrix() -> None:
    score = torch.arange(40.0).view(4, 10)
    mask = Pattern.parse("75%").select(score)
    assert mask.sum() == 10
    assert mask[3].all()


@pytest.mark.parametrize("text", ["4:2", "0:4", "2:2", "0%", "100%", "2/4", "", "half", "-1:4"])
def test_a_pattern_that_is_none_is_quoted(text: str) -> None:
    with pytest.raises(UserError, match="sparsity pattern") as raised:
        Pattern.parse(text)
    assert f"'{text}'" in str(raised.value)


# what all methods keep to


@pytest.mark.parametrize("method", SOLVERS)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "5:8", "6:8", "50%"])
def test_the_result_is_sparse_finite_without_negative_zero_and_the_same_again(method: str, pattern: str) -> None:
    weight, hessian = layer()
    weight[:, ::5] = -0.0
    parsed = Pattern.parse(pattern)
    pruned = prune(method, weight, hessian, parsed)
    assert pruned.dtype == torch.float32
    assert pruned.shape == weight.shape
    assert parsed.holds(pruned)
    assert torch.isfinite(pruned).all()
    assert not has_negative_zero(pruned)
    assert torch.equal(pruned, prune(method, weight, hessian, parsed))


@pytest.mark.parametrize("method", SOLVERS)
def test_the_weight_given_and_the_statistics_are_left_alone(method: str) -> None:
    weight, hessian = layer()
    before, moments = weight.clone(), hessian.clone()
    prune(method, weight, hessian)
    assert torch.equal(weight, before)
    assert torch.equal(hessian, moments)


@examples(20)
@given(st.integers(0, 10_000))
def test_each_better_method_has_the_smaller_error(seed: int) -> None:
    weight, hessian = layer(seed=seed)
    errors = [
        error(weight, prune(method, weight, hessian), hessian) for method in ("reconstruct", "sparsegpt", "wanda")
    ]
    assert errors == sorted(errors)


# Hessians that are hard


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "reconstruct"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_name_the_layer(method: str, bad: float) -> None:
    weight, hessian = layer()
    hessian[3, 3] = bad
    with pytest.raises(UserError, match="the inputs of 'layer' are not finite"):
        prune(method, weight, hessian)


@pytest.mark.parametrize("method", ["sparsegpt", "reconstruct"])
def test_a_hessian_that_cannot_be_factored_raises_the_damping_with_a_warning(
    method: str, caplog: pytest.LogCaptureFixture
) -> None:
    weight, hessian = layer()
    hessian -= 0.5 * torch.linalg.eigvalsh(hessian)[-1] * torch.eye(len(hessian))  # as if rounding had eaten it
    pruned = prune(method, weight, hessian)
    assert "the Hessian of 'layer' is singular: its damping was raised from 0.01 to" in caplog.text
    assert torch.isfinite(pruned).all()
    assert TWO_OF_FOUR.holds(pruned)


@pytest.mark.parametrize("method", SOLVERS)
def test_inputs_that_are_always_zero_lose_their_weights_first(method: str) -> None:
    weight, hessian = layer()[0].sign(), torch.eye(64)
    dead = [0, 5, 6, 11]  # never three in a group of 4
    hessian[dead] = 0
    hessian[:, dead] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruned = prune(method, weight, hessian)
    assert torch.isfinite(pruned).all()
    if method != "magnitude":
        assert (pruned[:, dead] == 0).all()


@pytest.mark.parametrize("method", ["sparsegpt", "reconstruct"])
def test_with_no_inputs_at_all_the_largest_weights_stay(method: str) -> None:
    weight, hessian = layer()
    pruned = prune(method, weight, torch.zeros_like(hessian))
    torch.testing.assert_close(pruned, prune("magnitude", weight, hessian))


@pytest.mark.parametrize("method", ["sparsegpt", "reconstruct"])
def test_fewer_tokens_than_inputs_still_give_a_finite_weight(method: str) -> None:
    weight, hessian = layer(tokens=8)
    assert torch.isfinite(prune(method, weight, hessian)).all()


# SparseGPT


def test_the_inverse_factor_is_the_inverse_of_the_damped_hessian() -> None:
    _, hessian = layer()
    upper = inverse_factor("layer", hessian)[0].double()
    assert torch.equal(upper, upper.triu())
    identity = upper.T @ upper @ damped(hessian).double()
    torch.testing.assert_close(identity, torch.eye(len(hessian), dtype=torch.float64), atol=1e-3, rtol=0)


def textbook(weight: Tensor, hessian: Tensor) -> Tensor:
    """Algorithm 1 of the paper, one input at a time, the inverse of what is left computed anew each time."""
    weight, hessian = weight.double().clone(), damped(hessian).double()
    size = len(hessian)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for j in range(size):
        inverse = torch.linalg.inv(hessian[j:, j:])
        if j % 4 == 0:
            diagonal = torch.stack([torch.linalg.inv(hessian[i:, i:])[0, 0] for i in range(j, j + 4)])
            mask[:, j : j + 4] = TWO_OF_FOUR.select(weight[:, j : j + 4] ** 2 / diagonal)
        lost = weight[:, j] * ~mask[:, j] / inverse[0, 0]
        weight[:, j:] -= lost[:, None] * inverse[0]
    return weight * mask


@pytest.mark.parametrize("in_features", [64, 140])  # within a panel; a second panel, cut short
def test_sparsegpt_gives_what_the_paper_gives(in_features: int) -> None:
    weight, hessian = layer(8, in_features, tokens=4 * in_features)
    pruned, expected = prune("sparsegpt", weight, hessian), textbook(weight, hessian)
    same_rows = ((pruned != 0) == (expected != 0)).all(1)
    assert same_rows.float().mean() >= 0.75  # a tie decided by rounding changes all of a row behind it
    torch.testing.assert_close(pruned[same_rows].double(), expected[same_rows], atol=2e-3, rtol=2e-3)


def test_the_joint_choice_is_the_best_of_all_masks_of_the_group() -> None:
    """Against the exact loss of each mask with everything behind it refitted."""
    weight, hessian = layer(16, 12)
    hessian = damped(hessian)
    upper, _ = inverse_factor("layer", hessian, damping=0.0)
    group = weight.T[:4].contiguous()
    mask, _ = prune_together(group, upper[:4, :4], TWO_OF_FOUR)
    for row in range(len(weight)):
        losses = {}
        for pruned in itertools.combinations(range(4), 2):
            kept = [i for i in range(12) if i not in pruned]
            values = torch.linalg.solve(hessian[kept][:, kept].double(), (hessian[kept] @ weight[row]).double())
            whole = torch.zeros(12, dtype=torch.float64)
            whole[kept] = values
            change = weight[row].double() - whole
            losses[pruned] = float(change @ hessian.double() @ change)
        actual = tuple(i for i in range(4) if not mask[i, row])
        assert losses[actual] <= min(losses.values()) * (1 + 1e-4)


def test_the_joint_choice_loses_less_over_a_whole_sweep() -> None:
    lost = {prune_in_turn: 0.0, prune_together: 0.0}
    for seed in range(5):
        weight, hessian = layer(seed=seed)
        upper, _ = inverse_factor("layer", hessian)
        for way in lost:
            swept = weight.T.contiguous()
            mask = sweep(swept, upper, TWO_OF_FOUR, way)
            lost[way] += error(weight, (swept * mask).T, hessian)
    assert lost[prune_together] < lost[prune_in_turn]


# reconstruct


def test_the_refit_reaches_the_least_squares_solution_of_every_row() -> None:
    weight, hessian = layer()
    hessian = damped(hessian)
    mask = TWO_OF_FOUR.select(weight.abs())
    target = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    refitted = refit(weight * mask, mask, target, hessian, steps=200)
    for row, kept in zip(range(len(weight)), mask, strict=True):
        expected = torch.linalg.solve(hessian[kept][:, kept].double(), target[row, kept].double())
        torch.testing.assert_close(refitted[row, kept].double(), expected, atol=1e-3, rtol=1e-3)
    assert (refitted[~mask] == 0).all()


def test_a_refit_of_a_solved_row_changes_nothing() -> None:
    weight, hessian = layer()
    mask = torch.ones_like(weight, dtype=torch.bool)
    refitted = refit(weight, mask, weight @ hessian, hessian, steps=5)
    torch.testing.assert_close(refitted, weight, atol=1e-4, rtol=1e-4)


def test_reconstruct_aims_between_the_layers_output_and_the_dense_models() -> None:
    """Where the inputs are the dense model's halved, the weight grows to make up for half of what was lost."""
    weight, hessian = layer()[0], torch.eye(64)
    plain = SOLVERS["reconstruct"]().prune("layer", weight, Statistics(hessian, hessian), TWO_OF_FOUR, whole(weight))
    grown = SOLVERS["reconstruct"]().prune(
        "layer", weight, Statistics(hessian, 2 * hessian), TWO_OF_FOUR, whole(weight)
    )
    torch.testing.assert_close(float(grown.norm() / plain.norm()), 1.5, atol=0.02, rtol=0)


def test_reconstruct_aims_between_the_layers_output_and_what_the_residual_stream_lacks() -> None:
    weight, hessian = layer()[0], torch.eye(64)
    plain = SOLVERS["reconstruct"]().prune(
        "layer", weight, Statistics(hessian, residual_cross=weight), TWO_OF_FOUR, whole(weight)
    )
    grown = SOLVERS["reconstruct"]().prune(
        "layer", weight, Statistics(hessian, residual_cross=3 * weight), TWO_OF_FOUR, whole(weight)
    )
    torch.testing.assert_close(grown, 2 * plain, atol=0.01, rtol=0.02)
