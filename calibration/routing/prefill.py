"""What the cheap engine's prefill shows of a prompt: its distribution of the next token. numpy alone.

The features are the principal components of the square roots of the probabilities, whose distances are Hellinger's. The
entropy and the margin of the same distribution add nothing to the prompt's features (docs/experiments.md).

Legend: N prompts, T listed tokens, V vocabulary, D components.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.routing.divergence import LogProbabilities

Floats = NDArray[np.float32]
RunPrefill = Callable[[], LogProbabilities | None]
"""Returns the cheap engine's likeliest next tokens after a prompt; None if it is down or full."""

COMPONENTS = 8
NAMES = tuple(f"next_token_{i}" for i in range(COMPONENTS))


@dataclass(frozen=True)
class Prefill:
    """components_VD: the principal directions; 0 for tokens that were likely after no training prompt."""

    components_VD: Floats

    def extract(self, next_token: LogProbabilities | None) -> Floats:
        """The features [D] of a distribution; not a number where there is none."""
        if next_token is None:
            return np.full(COMPONENTS, np.nan, np.float32)
        tokens_T, roots_T = _roots(next_token)
        features_D: Floats = roots_T @ self.components_VD[tokens_T]
        return features_D

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `from_arrays` reads back."""
        return {"components_VD": self.components_VD}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Prefill | None:
        """Reads `arrays` back; None where a router was saved without."""
        return cls(arrays["components_VD"]) if "components_VD" in arrays else None


def fit_prefill(next_tokens: Sequence[LogProbabilities], vocabulary: int) -> Prefill:
    """The principal components of N prompts' distributions, N above D."""
    rows = [_roots(next_token) for next_token in next_tokens]
    listed_T = np.unique(np.concatenate([tokens_T for tokens_T, _ in rows]))
    roots_NT = np.zeros((len(rows), len(listed_T)), np.float32)
    for root_T, (tokens_T, own_T) in zip(roots_NT, rows, strict=True):
        root_T[np.searchsorted(listed_T, tokens_T)] = own_T
    centered_NT = roots_NT - roots_NT.mean(axis=0)
    _, vectors_NN = np.linalg.eigh(centered_NT @ centered_NT.T)  # ascending; N x N, as T is many times larger
    components_VD = np.zeros((vocabulary, COMPONENTS), np.float32)
    components_VD[listed_T] = centered_NT.T @ vectors_NN[:, : -COMPONENTS - 1 : -1]
    return Prefill(components_VD)


def _roots(next_token: LogProbabilities) -> tuple[NDArray[np.int64], Floats]:
    """The tokens [T], which JSON makes strings, and the square roots of their probabilities [T]."""
    tokens_T = np.array(list(next_token), np.int64)
    return tokens_T, np.exp(np.array(list(next_token.values())) / 2).astype(np.float32)
