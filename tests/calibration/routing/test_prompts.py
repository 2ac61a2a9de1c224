"""Prompts of many lengths, and losses over the dense model's answer alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from calibration.routing.divergence import COMPARISONS, TRITON
from calibration.routing.prompts import SHORTEST, Loss, cut_prompts, measure_losses, seen_shares


def test_prompts_are_the_beginnings_of_their_windows_in_many_lengths():
    windows = np.arange(200 * 64).reshape(200, 64)
    prompts = cut_prompts(windows)
    lengths = [len(prompt) for prompt in prompts]
    assert all(prompt == tuple(row[: len(prompt)]) for prompt, row in zip(prompts, windows, strict=True))
    assert min(lengths) >= SHORTEST
    assert max(lengths) <= 64
    assert len(set(lengths)) > 20
    assert prompts == cut_prompts(windows)


def test_the_loss_is_the_divergence_over_the_answer_and_no_token_of_the_prompt():
    torch.manual_seed(0)
    table = torch.randn(16, 16)

    def dense(ids):
        return table[ids]

    def cheap(ids):
        """Differs at token 3 alone."""
        return table[ids] + (ids == 3)[..., None] * torch.arange(16.0)

    (inside,) = measure_losses(dense, cheap, [(1, 2)], [[3, 4, 5]])
    (outside,) = measure_losses(dense, cheap, [(3, 2)], [[4, 5]])
    expected = torch.nn.functional.kl_div(
        cheap(torch.tensor([3]))[0].log_softmax(0), dense(torch.tensor([3]))[0].log_softmax(0),
        log_target=True, reduction="sum",
    )  # fmt: skip
    assert inside.kl == pytest.approx(float(expected) / 3, rel=1e-5)  # token 3 predicts one of the answer's 3 tokens
    assert inside.disagreement == pytest.approx(1 / 3)
    assert outside.kl == pytest.approx(0, abs=1e-6)
    assert outside.disagreement == 0


def test_the_next_token_is_what_the_cheap_models_prefill_of_the_prompt_gives():
    torch.manual_seed(0)
    dense, cheap = torch.randn(512, 512), torch.randn(512, 512)
    (loss,) = measure_losses(lambda ids: dense[ids], lambda ids: cheap[ids], [(1, 2, 3)], [[7, 8, 9]])
    expected_V = cheap[3].log_softmax(0)
    assert sorted(loss.next_token) == sorted(expected_V.topk(TRITON.top).indices.tolist())
    for token, value in loss.next_token.items():
        assert value == pytest.approx(float(expected_V[token]), abs=1e-5)


def test_equal_models_lose_nothing():
    table = torch.randn(8, 8)
    (loss,) = measure_losses(lambda ids: table[ids], lambda ids: table[ids], [(1, 2, 3)], [[4]])
    assert (loss.kl, loss.disagreement) == (0.0, 0.0)


def test_a_shadow_run_measures_the_loss_of_a_small_vocabulary_and_a_part_of_a_large_ones():
    torch.manual_seed(0)
    for size, whole in ((16, True), (4096, False)):
        dense, cheap = torch.randn(size, size), torch.randn(size, size)
        losses = measure_losses(lambda ids, d=dense: d[ids], lambda ids, c=cheap: c[ids], [(1, 2)], [[3, 4, 5]])
        seen = seen_shares(losses)["triton"]
        assert (seen == pytest.approx(1, rel=1e-4)) is whole
        assert 0 < seen < 1.0001


def test_a_comparison_of_own_answers_ends_at_the_first_token_that_differs():
    """Five tokens, so that `completions` sees the whole vocabulary; the cheap model differs after token 3 alone."""
    table = 4 * torch.eye(5).roll(1, dims=1)  # the likeliest token is the next one

    def cheap(ids):
        return table[ids] + 8 * (ids == 3)[..., None] * torch.eye(5)[0]

    (early, late) = measure_losses(lambda ids: table[ids], cheap, [(3,), (0,)], [[4, 0, 1, 2], [1, 2, 3, 4]])
    assert early.seen_kl["triton"] == pytest.approx(early.kl, rel=1e-5)
    assert early.seen_kl["completions"] == pytest.approx(4 * early.kl, rel=1e-5)  # 1 of 4 tokens
    assert late.seen_kl["completions"] == pytest.approx(late.kl, rel=1e-5)  # the last token differs


def test_the_share_that_shadow_runs_measure_weighs_prompts_by_their_loss():
    halves = dict.fromkeys(COMPARISONS, 1.5)
    assert seen_shares([Loss(3.0, 0.0, halves), Loss(1.0, 0.0, dict.fromkeys(COMPARISONS, 0.9))]) == pytest.approx(
        dict.fromkeys(COMPARISONS, 0.6)
    )
    assert seen_shares([Loss(0.0, 0.0, dict.fromkeys(COMPARISONS, 0.0))]) == dict.fromkeys(COMPARISONS, 1.0)
