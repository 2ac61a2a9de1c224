"""Whether a router beats a random mix: loss against the share of requests on the cheap engine, on prompts it never saw.

Legend: N prompts, D documents, B resamples, S shares of requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SHARES = np.linspace(0, 1, 21)
RESAMPLES = 1000
CERTAINTY = 0.95
NORMAL_95 = 1.645  # standard errors: a one-sided bound of 95%


def choose_threshold(predicted_N: Floats, loss_N: Floats, budget: float) -> float:
    """The greatest predicted loss to serve cheaply, so that the mean loss over all requests stays within `budget`.

    The mean's upper bound (95%) counts, not the mean. -1 where no share of the requests fits. `predicted_N` must be
    out-of-sample predictions.
    """
    order_N = np.argsort(predicted_N, kind="stable")
    cost_N, size = loss_N[order_N], len(loss_N)
    mean_N, square_N = np.cumsum(cost_N) / size, np.cumsum(np.square(cost_N)) / size
    upper_N = mean_N + NORMAL_95 * np.sqrt(np.maximum(square_N - np.square(mean_N), 0) / size)
    fits = np.flatnonzero(upper_N <= budget)
    return float(predicted_N[order_N[fits[-1]]]) if fits.size else -1.0


def prove(predicted_N: Floats, loss_N: Floats, documents_N: NDArray[np.int64], seed: int = 0) -> dict[str, Any]:
    """`curve` and `gate` of the report. Documents are resampled whole, as their prompts resemble one another.

    A point of the curve holds the mean loss over all requests (nats per token) if the router, a random mix or an oracle
    selects which `share` of them the cheap engine serves. The gate: the area between the random mix's curve and the
    router's, as a share of the random mix's, is above 0 with 95% certainty.
    """
    weights_BN = resample_documents(documents_N, RESAMPLES, seed)
    router_BS = _curves(predicted_N, loss_N, weights_BN)
    gain_B = _saved(router_BS, loss_N, weights_BN)
    once_1N = np.ones((1, len(loss_N)))
    router_S, oracle_S = (_curves(key_N, loss_N, once_1N)[0] for key_N in (predicted_N, loss_N))
    random_S = SHARES * loss_N.mean()
    tail = (1 - CERTAINTY) / 2
    intervals = np.quantile(router_BS, [tail, 1 - tail], axis=0)
    curve = [
        {
            "share": round(float(share), 3),
            "loss": float(router_S[i]),
            "loss_interval": [float(bound) for bound in intervals[:, i]],
            "random_loss": float(random_S[i]),
            "oracle_loss": float(oracle_S[i]),
        }
        for i, share in enumerate(SHARES)
    ]
    return {"curve": curve, "gate": _gate(1 - float(router_S.mean() / random_S.mean()), gain_B, len(loss_N))}


def _gate(gain: float, gain_B: Floats, prompts: int) -> dict[str, Any]:
    least = float(np.quantile(gain_B, 1 - CERTAINTY))
    passed = least > 0
    compared = "loses less than" if passed else "is not shown to lose less than"
    message = f"on {prompts} held-out prompts the router {compared} a random mix: {gain:.1%} less, at least {least:.1%}"
    return {"name": "routing", "passed": passed, "value": gain, "limit": 0.0, "lower_bound": least, "message": message}


def resample_documents(documents_N: NDArray[np.int64], resamples: int, seed: int) -> Floats:
    """How often each prompt counts in each resample of the documents [B, N]."""
    _, of_N = np.unique(documents_N, return_inverse=True)
    count = int(of_N.max()) + 1
    picked_BD = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return picked_BD[:, of_N].astype(np.float64)


def saved_shares(key_N: Floats, loss_N: Floats, weights_BN: Floats) -> Floats:
    """The area between a random mix's curve and that of the order of `key_N`, as a share of the former, [B]."""
    return _saved(_curves(key_N, loss_N, weights_BN), loss_N, weights_BN)


def _saved(curves_BS: Floats, loss_N: Floats, weights_BN: Floats) -> Floats:
    random_B = SHARES.mean() * (weights_BN @ loss_N) / weights_BN.sum(axis=1)
    saved_B: Floats = 1 - curves_BS.mean(axis=1) / random_B
    return saved_B


def _curves(key_N: Floats, loss_N: Floats, weights_BN: Floats) -> Floats:
    """Mean loss over all requests [B, S] where those of the least `key_N` go to the cheap engine first."""
    order_N = np.argsort(key_N, kind="stable")
    weight_BN = weights_BN[:, order_N]
    total_B1 = weight_BN.sum(axis=1, keepdims=True)
    share_BN, cost_BN = (
        np.cumsum(weight_BN, axis=1) / total_B1,
        np.cumsum(weight_BN * loss_N[order_N], axis=1) / total_B1,
    )
    rows = (np.interp(SHARES, [0, *share], [0, *cost]) for share, cost in zip(share_BN, cost_BN, strict=True))
    return np.array(list(rows))
