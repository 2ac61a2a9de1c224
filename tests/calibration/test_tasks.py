"""The scores that lm-eval tasks are made of, against a hand calculation; the package itself is optional."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from calibration.evaluation.lm_eval import continuation, lm_eval_tasks, rolling
from plugins.common.errors import UserError

VOCABULARY = 5


def after(ids_BT: torch.Tensor) -> torch.Tensor:
    """A model that gives the next number after each token a logit of 2, all others 0."""
    return 2.0 * torch.nn.functional.one_hot((ids_BT + 1) % VOCABULARY, VOCABULARY).float()


LIKELY = float(torch.tensor([2.0, 0, 0, 0, 0]).log_softmax(0)[0])
UNLIKELY = LIKELY - 2


def test_a_continuation_scores_its_own_tokens_only() -> None:
    score, greedy = continuation(after, [0, 1], [2, 3], context=8)
    assert score == pytest.approx(2 * LIKELY)
    assert greedy


def test_a_continuation_that_greedy_would_not_generate() -> None:
    score, greedy = continuation(after, [0, 1], [2, 0], context=8)
    assert score == pytest.approx(LIKELY + UNLIKELY)
    assert not greedy


def test_a_long_prompt_is_cut_from_the_left() -> None:
    assert continuation(after, [4, 4, 4, 4, 1], [2], context=2) == continuation(after, [4, 1], [2], context=8)


def test_rolling_counts_every_token_but_the_first_once() -> None:
    assert rolling(after, [0, 1, 2, 3, 4, 0, 1], context=3) == pytest.approx(6 * LIKELY)


def test_a_task_without_the_package_names_it(docs_llama: Path) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="'lm_eval'"):
            lm_eval_tasks(after, docs_llama, ["piqa"], 8)
    else:
        pytest.skip("lm_eval is installed here")
