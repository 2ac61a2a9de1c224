"""Requests of a router to its models, besides answers: cancel a request, and score a text.

Both are parameters of a request. A score is JSON in `text_output`: for each token of the answer, the log-probabilities
of the likeliest tokens in its place. A ticket is random, so that no client cancels another's request.
"""

from __future__ import annotations

import json
from typing import Any

from builder.engines.base import Engine
from calibration.routing.divergence import TRITON, LogProbabilities, likeliest

TICKET = "twofour_ticket"  # names a request, so that it can be cancelled
CANCEL = "twofour_cancel"  # the ticket of the request to cancel
SCORE_FROM = "twofour_score_from"  # the answer's first position in input_ids


def score(engine: Engine, input_ids: list[int], start: int) -> str:
    """The score of the tokens from `start` on, each in its own context."""
    import torch

    ids_BT = torch.tensor([input_ids])
    logits_AV = engine.logits(ids_BT)[0, start - 1 : -1].float()
    return json.dumps(likeliest(logits_AV.log_softmax(dim=-1), TRITON.top))


def read_score(text: str) -> list[LogProbabilities]:
    """Reads `score` back."""
    positions: list[Any] = json.loads(text)
    return positions
