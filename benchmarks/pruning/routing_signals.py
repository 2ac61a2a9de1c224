"""Features of both engines' logits over a prompt, as predictors of the prompt's loss on the build."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Signals = dict[str, float]

SPANS = {"last": 1, "8": 8, "16": 16, "all": 1 << 30}  # the last positions that are averaged
_BUILT = ("entropy", "margin", "surprisal")
GROUPS: dict[str, tuple[str, ...]] = {
    "entropy and margin, last position": ("entropy last", "margin last"),
    **{
        f"entropy, margin and surprisal, {title}": tuple(f"{name} {span}" for name in _BUILT)
        for span, title in (("8", "last 8"), ("16", "last 16"), ("all", "all positions"))
    },
    "all of these": tuple(f"{name} {span}" for name in _BUILT for span in SPANS),
    "divergence over the prompt (dense prefill too)": ("divergence last", "divergence 8", "divergence all"),
}
"""Signals that are tried together, by name. The last needs the dense engine's prefill too."""
_LEAST = 1e-4  # nats: divergences below it count as equal


def read_signals(dense_TV: Any, built_TV: Any, prompt: Sequence[int]) -> Signals:
    """By name and span, from logits [T, V]: means over positions, nats.

    entropy: of the build's next token. margin: between the log-probabilities of its two likeliest tokens
    surprisal: of the prompt's own tokens under the build. divergence: the log of KL(dense || build)
    """
    import torch

    dense_log_TV, log_TV = dense_TV.float().log_softmax(-1), built_TV.float().log_softmax(-1)
    two_T2 = log_TV.topk(2).values
    values = {
        "entropy": -(log_TV.exp() * log_TV).sum(-1),
        "margin": two_T2[:, 0] - two_T2[:, 1],
        "surprisal": -log_TV[:-1].gather(1, torch.tensor(prompt)[1:, None])[:, 0],
        "divergence": (dense_log_TV.exp() * (dense_log_TV - log_TV)).sum(-1),
    }
    means = {
        f"{name} {span}": value_T[-count:].mean() for name, value_T in values.items() for span, count in SPANS.items()
    }
    return {name: float(mean.clamp_min(_LEAST).log() if "divergence" in name else mean) for name, mean in means.items()}
