"""Predicts what a prompt loses on the cheap engine: ridge regression of the logarithm of its loss. numpy alone.

Leave-one-out predictions come in closed form (Allen 1974, PRESS): they choose the penalty, and their residuals give the
interval (the jackknife of Barber et al. 2021, section 1: without that paper's guarantee, which the jackknife+ has).

Legend: N prompts, F features, P terms (the features, their squares and 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PENALTIES = tuple(10.0**power for power in range(-3, 6))
CONFIDENCE = 0.9
LEAST_LOSS = 1e-6  # nats per token: below it losses count as equal
EXTREME = 4.0  # standard deviations: features beyond it count as this far


@dataclass(frozen=True)
class Prediction:
    """Expected loss of one prompt, nats per token, and the interval that holds 90% of the losses."""

    loss: float
    low: float
    high: float


@dataclass(frozen=True)
class Predictor:
    """`weights_P` act on standardized features; `quantiles` are those of the leave-one-out residuals."""

    mean_F: Floats
    scale_F: Floats
    weights_P: Floats
    smearing: float  # the mean of exp(residual): from the mean logarithm to the mean (Duan 1983)
    quantiles: tuple[float, float]

    def predict(self, features_F: NDArray[Any]) -> Prediction:
        """The prediction for one prompt; an infinite loss where a feature is not finite."""
        if not np.isfinite(features_F).all():
            return Prediction(float("inf"), float("inf"), float("inf"))
        with np.errstate(over="ignore"):
            terms_P = _terms(features_F[None], self.mean_F, self.scale_F)[0]
            log_loss = float(terms_P @ self.weights_P)
            low, high = (float(np.exp(log_loss + quantile)) for quantile in self.quantiles)
            return Prediction(float(np.exp(log_loss)) * self.smearing, low, high)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `from_arrays` reads back."""
        rest = np.array([self.smearing, *self.quantiles])
        return {"mean_F": self.mean_F, "scale_F": self.scale_F, "weights_P": self.weights_P, "residuals": rest}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Predictor:
        """Reads `arrays` back."""
        smearing, low, high = (float(value) for value in arrays["residuals"])
        return cls(arrays["mean_F"], arrays["scale_F"], arrays["weights_P"], smearing, (low, high))


@dataclass(frozen=True)
class Fit:
    """A predictor, and its leave-one-out predictions for each prompt of its text [N]."""

    predictor: Predictor
    left_out_N: Floats
    penalty: float


def fit(features_NF: NDArray[Any], loss_N: Floats) -> Fit:
    """Fits the loss of N prompts, nats per token."""
    mean_F, scale_F = features_NF.mean(axis=0).astype(np.float64), features_NF.std(axis=0).astype(np.float64)
    scale_F[scale_F == 0] = 1.0
    terms_NP = _terms(features_NF, mean_F, scale_F)
    log_N = np.log(np.maximum(loss_N, LEAST_LOSS))
    fits = [(penalty, *_ridge(terms_NP, log_N, penalty)) for penalty in PENALTIES]
    penalty, weights_P, residual_N = min(fits, key=lambda each: float(np.square(each[2]).mean()))
    smearing = float(np.exp(residual_N).mean())
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(value) for value in np.quantile(residual_N, [tail, 1 - tail]))
    predictor = Predictor(mean_F, scale_F, weights_P, smearing, (low, high))
    return Fit(predictor, np.exp(log_N - residual_N) * smearing, penalty)


def _terms(features_NF: NDArray[Any], mean_F: Floats, scale_F: Floats) -> Floats:
    standard_NF = np.clip((features_NF - mean_F) / scale_F, -EXTREME, EXTREME)
    return np.concatenate([np.ones((len(standard_NF), 1)), standard_NF, np.square(standard_NF) - 1], axis=1)


def _ridge(terms_NP: Floats, target_N: Floats, penalty: float) -> tuple[Floats, Floats]:
    """Weights [P], the constant free of the penalty, and leave-one-out residuals [N]."""
    penalties_PP = penalty * np.eye(terms_NP.shape[1])
    penalties_PP[0, 0] = 1e-9
    inverse_PP = np.linalg.inv(terms_NP.T @ terms_NP + penalties_PP)
    weights_P = inverse_PP @ terms_NP.T @ target_N
    leverage_N = np.einsum("np,pq,nq->n", terms_NP, inverse_PP, terms_NP)
    return weights_P, (target_N - terms_NP @ weights_P) / np.maximum(1 - leverage_N, 1e-6)
