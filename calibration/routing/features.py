"""What a prompt's tokens show before any model has run: numbers that a router decides by. numpy alone.

Legend: T tokens of a prompt, V vocabulary, F features, D projected dimensions, W windows of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from plugins.common.errors import UserError

Floats = NDArray[np.float32]
Tokens = NDArray[np.int64]

PROJECTED = 8  # dimensions of the mean embedding
FOLDS = 5  # of the documents; the tables of a fold are fitted on the others
RARE = 0.1  # the rarest tokens that make up this share of the text
CODE = frozenset("{}[]()<>=;:_/\\#@$%&*+|~^`\"'\n\t")
NAMES = (
    "log_tokens",
    "mean_surprisal",
    "max_surprisal",
    "rare_share",
    "digit_share",
    "code_share",
    *(f"embedding_{i}" for i in range(PROJECTED)),
)


@dataclass(frozen=True)
class Features:
    """Tables by token id, so that a prompt's features are a gather and a mean.

    surprisal_V: nats, under a unigram model of the calibration text, with one added to each count
    flags_V3: whether a token is rare in that text, holds a digit, or consists of the signs of code
    projected_VD: the embedding under a random projection, which keeps distances (Johnson and Lindenstrauss, 1984)
    """

    surprisal_V: Floats
    flags_V3: Floats
    projected_VD: Floats

    names = NAMES

    def extract(self, token_ids: Sequence[int] | Tokens) -> Floats:
        """The features [F] of a prompt [T]. Raises UserError for an empty prompt and for ids beyond the vocabulary."""
        ids_T = np.asarray(token_ids, dtype=np.int64)
        if ids_T.size == 0:
            raise UserError("the prompt is empty", "send at least one token")
        if ids_T.min() < 0 or ids_T.max() >= len(self.surprisal_V):
            raise UserError(
                f"the prompt holds token {ids_T.max()}, beyond the vocabulary of {len(self.surprisal_V)}",
                "encode it with the model's own tokenizer",
            )
        surprisal_T = self.surprisal_V[ids_T]
        head = (np.log(ids_T.size), surprisal_T.mean(), surprisal_T.max())
        parts = (head, self.flags_V3[ids_T].mean(axis=0), self.projected_VD[ids_T].mean(axis=0))
        features_F: Floats = np.concatenate(parts).astype(np.float32)
        return features_F

    def with_text(self, text_WT: Tokens) -> Features:
        """The same tables, with the surprisal and the rare tokens of another text [W, T]."""
        counts_V = np.bincount(text_WT.ravel(), minlength=len(self.surprisal_V)).astype(np.float64) + 1
        share_V = counts_V / counts_V.sum()
        order = np.argsort(share_V, kind="stable")
        flags_V3 = self.flags_V3.copy()
        flags_V3[:, 0] = False
        flags_V3[order[np.cumsum(share_V[order]) <= RARE], 0] = True
        return replace(self, surprisal_V=(-np.log(share_V)).astype(np.float32), flags_V3=flags_V3)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What `from_arrays` reads back."""
        return {name: getattr(self, name) for name in ("surprisal_V", "flags_V3", "projected_VD")}

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Features:
        """Reads `arrays` back."""
        return cls(arrays["surprisal_V"], arrays["flags_V3"], arrays["projected_VD"])


def unseen_features(
    features: Features, prompts: Sequence[Sequence[int]], text_WT: Tokens, documents_W: Tokens
) -> Floats:
    """The features [W, F] of each window's prompt, with tables fitted without its document.

    A request's own text is in no table: its tokens are rarer than those of the text that the tables were fitted on.
    """
    fold_W = np.unique(documents_W, return_inverse=True)[1] % FOLDS
    features_WF = np.empty((len(prompts), len(NAMES)), np.float32)
    for fold in range(min(FOLDS, int(fold_W.max()) + 1)):
        out_W = fold_W == fold
        tables = features.with_text(text_WT[~out_W])
        for at in np.flatnonzero(out_W):
            features_WF[at] = tables.extract(prompts[at])
    return features_WF


def fit_features(text_WT: Tokens, embedding_VK: Floats, pieces: Sequence[str], seed: int = 0) -> Features:
    """Features of a model with input embedding [V, K] and the tokens' `pieces`, from text [W, T]."""
    size = len(embedding_VK)
    digits_V = [any(sign.isdigit() for sign in piece) for piece in pieces]
    code_V = [bool(piece.strip(" ")) and set(piece.strip(" ")) <= CODE for piece in pieces]
    width = embedding_VK.shape[1]
    projection_KD = np.random.default_rng(seed).standard_normal((width, PROJECTED)) / np.sqrt(width)
    scale = float(np.sqrt(np.square(embedding_VK).mean())) or 1.0
    flags_V3 = np.zeros((size, 3), dtype=np.float32)
    flags_V3[: len(pieces), 1:] = np.array([digits_V, code_V]).T[:size]  # an embedding may have rows beyond the tokens
    projected_VD = embedding_VK @ projection_KD / scale
    fixed = Features(np.zeros(size, np.float32), flags_V3, projected_VD.astype(np.float32))
    return fixed.with_text(text_WT)
