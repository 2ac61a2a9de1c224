"""The requests of a routing benchmark, with a mix of texts that changes, and the comparison at equal share.

Legend: N prompts, R requests, B resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.routing.proof import resample_documents

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Numbers = NDArray[np.int64]

RESAMPLES = 5000


def equal_share(cheap_N: Flags, loss_N: Floats, documents_N: Numbers, seed: int = 0) -> dict[str, Any]:
    """The router's mean loss over all prompts against a random mix's with as many cheap ones, nats per token.

    cheap_N: prompts that the cheap engine answered. A random mix of that share loses share x mean(loss). `gain` is the
    part of it that the router saves. Intervals of 95%: documents are resampled whole, the share with them.
    """
    resamples = _compared(resample_documents(documents_N, RESAMPLES, seed), cheap_N, loss_N)
    values = _compared(np.ones((1, len(loss_N))), cheap_N, loss_N)
    return {
        name: {"value": float(values[name][0]), "interval": np.quantile(resamples[name], [0.025, 0.975]).tolist()}
        for name in values
    }


def _compared(weights_BN: Floats, cheap_N: Flags, loss_N: Floats) -> dict[str, Floats]:
    total_B = weights_BN.sum(axis=1)
    share_B = weights_BN @ cheap_N / total_B
    router_B = weights_BN @ (cheap_N * loss_N) / total_B
    random_B = share_B * (weights_BN @ loss_N) / total_B
    saved_B = random_B - router_B
    gain_B = np.divide(saved_B, random_B, out=np.zeros_like(saved_B), where=random_B > 0)
    return {"share": share_B, "router_loss": router_B, "random_loss": random_B, "gain": gain_B}


def schedule(kinds: Sequence[str], requests: int, first: str, share: float, seed: int = 0) -> Numbers:
    """The prompt of each request [R]: kind `first` has `share` of the first half, and 1 - share of the second.

    Prompts of a kind are sent in a random order and repeat only after all of them were sent.
    """
    random = np.random.default_rng(seed)
    kind_N = np.array(kinds)
    half = requests // 2
    chance_R = np.where(np.arange(requests) < half, share, 1 - share)
    is_first_R = random.random(requests) < chance_R
    order_R = np.empty(requests, np.int64)
    for places, own in ((is_first_R, kind_N == first), (~is_first_R, kind_N != first)):
        prompts, needed = np.flatnonzero(own), int(places.sum())
        rounds = [random.permutation(prompts) for _ in range(-(-needed // len(prompts)))]
        order_R[places] = np.concatenate([np.empty(0, np.int64), *rounds])[:needed]
    return order_R


def arrivals(requests: int, rate: float, seed: int = 0) -> Floats:
    """The arrival time of each request [R], seconds: a Poisson process of `rate` requests a second."""
    return np.random.default_rng(seed).exponential(1 / rate, requests).cumsum()


def spent(cheap_R: Flags, loss_R: Floats, budget: float) -> dict[str, dict[str, float]]:
    """For each half of the requests and for all: mean loss in budgets (0 for dense answers) and the cheap share."""
    half = len(loss_R) // 2
    parts = {"first half": slice(0, half), "second half": slice(half, None), "all": slice(None)}
    return {
        name: {
            "loss_over_budget": float((cheap_R * loss_R)[part].mean() / budget),
            "all_cheap_over_budget": float(loss_R[part].mean() / budget),
            "cheap_share": float(cheap_R[part].mean()),
        }
        for name, part in parts.items()
    }
