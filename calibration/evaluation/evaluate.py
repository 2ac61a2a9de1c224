"""How far a built model is from its dense one on held-out tokens: perplexity, KL divergence, top-1 agreement.

A model is a callable from token ids [B, T] int64 to logits [B, T, V] float32 (`Engine.logits`, or `hf_logits(model)`).
Only one batch of logits is held at a time. Negative token ids are padding: never counted, and fed to the model as 0.

Shapes: B batch, T tokens, V vocabulary, P predicted positions of one window (T - 1 less padding), D documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calibration import config
from plugins.common.errors import GateError, UserError
from plugins.common.progress import Progress

Logits = Callable[[Tensor], Tensor]
Tokens = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]
Gate = dict[str, Any]

RESAMPLES = 2000  # of the documents, for the interval
CONFIDENCE = 0.95
LARGEST = 700.0  # nats: the upper bound of a loss, whose exponential is finite
AT_ONCE = 1 << 20  # logits of each model that are compared at once
BATCH = 4  # windows: logits of both models at 256 tokens and a vocabulary of 128k take 1 GB


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log likelihood (nats) a predicted token."""

    perplexity: float


@dataclass(frozen=True)
class Accuracy:
    """The built model against the dense one, as in report.json's `accuracy`."""

    dense: Perplexity
    built: Perplexity
    perplexity_increase: float  # built / dense - 1
    perplexity_increase_interval: tuple[float, float]  # 95%, from resampled documents, both models on the same ones
    kl: float  # mean KL(dense || built) a token, nats
    top1_agreement: float  # share of tokens where both models put the same token first
    tokens: int  # predicted
    documents: int
    context_length: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for report.json."""
        values = asdict(self)
        values["perplexity_increase_interval"] = list(self.perplexity_increase_interval)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Accuracy:
        """Reads `to_dict`'s values back; ignores report.json's other fields."""
        known = {field.name: values[field.name] for field in fields(cls)}
        known["dense"], known["built"] = (Perplexity(values[side]["perplexity"]) for side in ("dense", "built"))
        known["perplexity_increase_interval"] = tuple(values["perplexity_increase_interval"])
        return cls(**known)


def evaluate(
    dense: Logits, built: Logits, tokens: Tokens, documents: Tokens | None = None, progress: Progress | None = None
) -> Accuracy:
    """Compares two models on `tokens` [windows, T]; `documents` [windows] numbers each window's document.

    Without `documents` each window counts as one. Deterministic for deterministic models. Raises UserError for tokens
    that predict nothing or logits of different shapes, GateError where a model's logits are not finite.
    """
    _, document_of = np.unique(_documents(tokens, documents), return_inverse=True)
    sums = np.zeros((5, int(document_of.max()) + 1))  # dense loss, built loss, KL, agreements, tokens; by document
    window = 0
    for ids_BT, input_BT in _batches(tokens):
        with torch.inference_mode():
            dense_BTV, built_BTV = dense(input_BT), built(input_BT)
            _require_same_shape(dense_BTV, built_BTV)
            for ids_T, dense_TV, built_TV in zip(ids_BT, dense_BTV, built_BTV, strict=True):
                _require_finite(dense_TV, "dense", window)
                _require_finite(built_TV, "built", window)
                sums[:, document_of[window]] += _compare(ids_T, dense_TV, built_TV)
                window += 1
        if progress:
            progress("evaluate", window, len(tokens))
    return _accuracy(sums, tokens.shape[1])


def _accuracy(sums: Floats, context_length: int) -> Accuracy:
    """Of the sums [dense loss, built loss, KL, agreements, tokens] of each document."""
    counts_D = sums[4]
    total = counts_D.sum()
    dense_loss, built_loss, kl, agreement = (float(value) for value in sums[:4].sum(axis=1) / total)
    return Accuracy(
        dense=Perplexity(math.exp(min(dense_loss, LARGEST))),
        built=Perplexity(math.exp(min(built_loss, LARGEST))),
        perplexity_increase=math.expm1(min(built_loss - dense_loss, LARGEST)),
        perplexity_increase_interval=_interval(sums[1] - sums[0], counts_D),
        kl=kl,
        top1_agreement=agreement,
        tokens=int(total),
        documents=int((counts_D > 0).sum()),
        context_length=context_length,
    )


def perplexity(model: Logits, tokens: Tokens) -> float:
    """Of one model on `tokens` [windows, T]. Raises UserError and GateError as `evaluate` does."""
    _documents(tokens, None)
    loss, count, window = 0.0, 0, 0
    for ids_BT, input_BT in _batches(tokens):
        with torch.inference_mode():
            for ids_T, logits_TV in zip(ids_BT, model(input_BT), strict=True):
                _require_finite(logits_TV, "given", window)
                for target_P, log_PV in _predictions(ids_T, logits_TV):
                    loss += _loss(log_PV, target_P)
                    count += len(target_P)
                window += 1
    return math.exp(min(loss / count, LARGEST))


def hf_logits(model: Any) -> Logits:
    """A transformers causal language model as a callable to float32 logits."""

    def logits(input_ids_BT: Tensor) -> Tensor:
        output: Tensor = model(input_ids_BT.to(model.device), use_cache=False).logits
        return output.float()

    return logits


def in_precision(model: Any, compute: str) -> Any:
    """A transformers model that computes as `accuracy.compute`: on a CPU float32 casts it, in place.

    In 16 bit close logits become equal ones, and a search would not measure what the engines' evaluation does.
    """
    return model.float() if compute == "float32" and model.device.type == "cpu" else model


def gates(accuracy: Accuracy, limits: config.Accuracy) -> list[Gate]:
    """The results of the recipe's limits: one {name, limit, value, passed, message} for each limit that is set."""
    rows: list[Gate] = []
    if limits.max_perplexity_increase is not None:
        value, limit = accuracy.perplexity_increase, limits.max_perplexity_increase
        change = f"{accuracy.dense.perplexity:.2f} -> {accuracy.built.perplexity:.2f}"
        sentence = f"perplexity {change}, {value:+.2%} (at most {limit:.2%})"
        rows.append(_gate("perplexity_increase", limit, value, value <= limit, sentence))
    if limits.min_top1_agreement is not None:
        value, limit = accuracy.top1_agreement, limits.min_top1_agreement
        sentence = f"the same first token as the dense model at {value:.2%} of positions (at least {limit:.2%})"
        rows.append(_gate("top1_agreement", limit, value, value >= limit, sentence))
    return rows


def _gate(name: str, limit: float, value: float, passed: bool, sentence: str) -> Gate:
    return {"name": name, "limit": limit, "value": value, "passed": passed, "message": sentence}


def _documents(tokens: Tokens, documents: Tokens | None) -> Tokens:
    """The document of each window, after checking that there is something to predict."""
    if tokens.ndim != 2 or tokens.shape[0] == 0 or not (tokens[:, 1:][tokens[:, :-1] >= 0] >= 0).any():
        raise UserError(f"tokens of shape {list(tokens.shape)} predict nothing: give windows of 2 or more tokens")
    if documents is None:
        return np.arange(len(tokens), dtype=np.int64)
    if len(documents) != len(tokens):
        raise UserError(f"{len(documents)} document numbers for {len(tokens)} windows: give one per window")
    return documents


def _batches(tokens: Tokens) -> Iterator[tuple[Tensor, Tensor]]:
    """Token ids [B, T] as they are, and as a model takes them, with 0 for padding."""
    for start in range(0, len(tokens), BATCH):
        ids_BT = torch.from_numpy(np.ascontiguousarray(tokens[start : start + BATCH]))
        yield ids_BT, ids_BT.clamp_min(0)


def _predictions(ids_T: Tensor, *models_TV: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The targets [P] of one window and the log probabilities [P, V] that each model gives, a few positions at a time.

    No padding on either side of a prediction. What is computed for a few positions stays in a processor's cache.
    """
    predicted_P = ((ids_T[1:] >= 0) & (ids_T[:-1] >= 0)).nonzero().squeeze(1)
    for part_P in predicted_P.split(max(1, AT_ONCE // models_TV[0].shape[1])):
        device = models_TV[0].device
        logits = (logits_TV[part_P.to(logits_TV.device)].to(device).float() for logits_TV in models_TV)
        yield ids_T[part_P + 1].to(device), *(logits_PV.log_softmax(dim=-1) for logits_PV in logits)


def _loss(log_PV: Tensor, target_P: Tensor) -> float:
    return -float(log_PV.gather(1, target_P[:, None]).sum(dtype=torch.float64))


def _compare(ids_T: Tensor, dense_TV: Tensor, built_TV: Tensor) -> Floats:
    """One window's sums over its predicted positions: dense loss, built loss, KL, agreements, count."""
    sums = np.zeros(5)
    for target_P, dense_PV, built_PV in _predictions(ids_T, dense_TV, built_TV):
        kl = float((dense_PV.exp() * (dense_PV - built_PV)).sum(dtype=torch.float64))
        agreements = int((dense_PV.argmax(dim=-1) == built_PV.argmax(dim=-1)).sum())
        sums += [_loss(dense_PV, target_P), _loss(built_PV, target_P), kl, agreements, len(target_P)]
    return sums


def _require_same_shape(dense_BTV: Tensor, built_BTV: Tensor) -> None:
    if dense_BTV.shape != built_BTV.shape:
        shapes = f"{list(dense_BTV.shape)} and {list(built_BTV.shape)}"
        raise UserError(f"the dense and the built model give logits of shapes {shapes}: compare builds of one model")


def _require_finite(logits_TV: Tensor, which: str, window: int) -> None:
    if math.isfinite(float(logits_TV.sum())):  # reads the logits once; the sum of large ones may overflow
        return
    if not bool(torch.isfinite(logits_TV).all()):
        position = int((~torch.isfinite(logits_TV)).any(dim=-1).nonzero()[0])
        raise GateError(f"the {which} model's logits are not finite at window {window}, position {position}")


def _interval(difference_D: Floats, counts_D: Floats) -> tuple[float, float]:
    """Percentile bootstrap over documents of exp(mean loss difference) - 1 (Efron and Tibshirani 1993, chapter 13)."""
    picked = np.random.default_rng(0).integers(len(counts_D), size=(RESAMPLES, len(counts_D)))
    mean = difference_D[picked].sum(axis=1) / np.maximum(counts_D[picked].sum(axis=1), 1)
    ratio = np.expm1(np.minimum(mean, LARGEST))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratio, [tail, 1 - tail])
    return float(low), float(high)
