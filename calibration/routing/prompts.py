"""Prompts cut from text, and the loss of each on the cheap engine: KL from the dense model on its own continuation.

Legend: W windows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calibration.evaluation.evaluate import Logits
from calibration.routing.divergence import COMPARISONS, TRITON, Comparison, LogProbabilities, likeliest, mean_kl
from plugins.common.progress import Progress

SHORTEST = 8  # tokens of a prompt


def cut_prompts(windows_WT: NDArray[np.int64], seed: int = 0) -> list[tuple[int, ...]]:
    """A prompt of each window: its first tokens, of a length drawn evenly on a logarithmic scale."""
    longest = windows_WT.shape[1]
    shares_W = np.random.default_rng(seed).random(len(windows_WT))
    lengths_W = np.rint(SHORTEST * (longest / SHORTEST) ** shares_W).astype(int).clip(1, longest)
    return [tuple(row[:length].tolist()) for row, length in zip(windows_WT, lengths_W, strict=True)]


@dataclass(frozen=True)
class Loss:
    """One prompt's loss: mean KL(dense || cheap) a token (nats), and the share of tokens whose first choice differs.

    seen_kl: what a shadow run measures instead, for each of COMPARISONS
    next_token: what the cheap engine's prefill of the prompt gives, the likeliest tokens after it
    """

    kl: float
    disagreement: float
    seen_kl: Mapping[str, float]
    next_token: LogProbabilities = field(default_factory=dict)


@torch.inference_mode()
def measure_losses(
    dense: Logits,
    cheap: Logits,
    prompts: Sequence[tuple[int, ...]],
    answers: Sequence[Sequence[int]],
    progress: Progress | None = None,
) -> list[Loss]:
    """The loss of each prompt over the dense model's answer to it, both models reading the same tokens."""
    losses = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids_1T = torch.tensor([[*prompt, *answer]])
        dense_TV, cheap_TV = (_predictions(model(ids_1T)[0], len(prompt)) for model in (dense, cheap))
        kl = (dense_TV.exp() * (dense_TV - cheap_TV.to(dense_TV.device))).sum(dim=1).mean()
        differs = (dense_TV.argmax(dim=1) != cheap_TV.argmax(dim=1).to(dense_TV.device)).float().mean()
        seen = {name: _seen_kl(dense_TV, cheap_TV, comparison) for name, comparison in COMPARISONS.items()}
        [next_token] = likeliest(cheap_TV[:1], TRITON.top)
        losses.append(Loss(max(float(kl), 0.0), float(differs), seen, next_token))
        if progress:
            progress("measure prompts", number + 1, len(prompts))
    return losses


def seen_shares(losses: Sequence[Loss]) -> dict[str, float]:
    """The ratio of what shadow runs measure to the KL, both summed over the prompts, for each of COMPARISONS.

    1 if there is no loss.
    """
    whole = sum(loss.kl for loss in losses)
    seen = {name: sum(loss.seen_kl[name] for loss in losses) for name in COMPARISONS}
    return {name: part / whole if part > 0 < whole else 1.0 for name, part in seen.items()}


def _seen_kl(dense_TV: torch.Tensor, cheap_TV: torch.Tensor, comparison: Comparison) -> float:
    """The loss that a shadow run measures on greedy answers, in nats per token."""
    length = len(dense_TV)
    if comparison.own_answers:
        differs_T = dense_TV.argmax(dim=1).cpu() != cheap_TV.argmax(dim=1).cpu()
        length = int(differs_T.int().argmax()) + 1 if differs_T.any() else length
    parts = (likeliest(log_TV[:length], comparison.top) for log_TV in (dense_TV, cheap_TV))
    return mean_kl(zip(*parts, strict=True))


def _predictions(logits_TV: Any, prompt: int) -> Any:
    """Log probabilities of the answer's tokens."""
    return logits_TV[prompt - 1 : -1].float().log_softmax(dim=1)
