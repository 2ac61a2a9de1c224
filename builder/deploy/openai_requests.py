"""What the router reads of OpenAI's requests and answers: the prompt's tokens, and log-probabilities to compare."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from calibration.routing.divergence import COMPARISONS, LogProbabilities, mean_kl
from plugins.common.errors import UserError

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
SHADOW_TOKENS = 32  # tokens of an answer that a shadow run compares
COMPARED = {CHAT: "chat", COMPLETIONS: "completions"}  # names of COMPARISONS


def parse(raw: bytes) -> dict[str, Any]:
    """The body of a request. Raises UserError where it is not a JSON object."""
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError):
        raise UserError("the request is not JSON", "send a JSON object") from None
    if not isinstance(body, dict):
        raise UserError(f"the request is {json.dumps(body)[:40]}", "send a JSON object")
    return body


def prompt_tokens(path: str, body: Mapping[str, Any], tokenizer: Any) -> np.ndarray[Any, Any] | None:
    """Token ids [T] int64 of a request's prompt, of several prompts joined; None if it is not text but an image.

    Raises UserError for a prompt that is missing.
    """
    from calibration.data.encoding import encode_text

    key = "messages" if path == CHAT else "prompt"
    if not body.get(key):
        raise UserError(f"'{key}' is empty" if key in body else f"no '{key}'", "send a prompt")
    if path != CHAT:
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        if all(isinstance(prompt, int) for prompt in prompts):
            return np.array(prompts, np.int64)
        if all(isinstance(prompt, str) for prompt in prompts):
            return np.array(encode_text(tokenizer, "\n".join(prompts)), np.int64)
        return None
    try:
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(
                body["messages"], tools=body.get("tools"), tokenize=False, add_generation_prompt=True
            )
        else:
            text = "\n".join(message["content"] for message in body["messages"])
    except Exception:  # a template is a program, and messages are the client's: the engine's server judges them
        return None
    return np.array(encode_text(tokenizer, text, add_special_tokens=not tokenizer.chat_template), np.int64)


def shadow_request(path: str, body: Mapping[str, Any]) -> dict[str, Any]:
    """The request again: greedy, short, not streamed, with log-probabilities."""
    kept = {key: value for key, value in body.items() if key not in ("stream", "stream_options", "n", "best_of")}
    limit = next((body[key] for key in ("max_completion_tokens", "max_tokens") if isinstance(body.get(key), int)), None)
    kept.pop("max_completion_tokens", None)
    top = COMPARISONS[COMPARED[path]].top
    probabilities = {"logprobs": True, "top_logprobs": top} if path == CHAT else {"logprobs": top}
    return {**kept, "temperature": 0, "max_tokens": min(limit or SHADOW_TOKENS, SHADOW_TOKENS), **probabilities}


def measured_loss(dense: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """KL(dense || other) in nats per token over the tokens that both greedy answers share, and the first that differs.

    Up to there both engines saw the same text. Raises ValueError where an answer has no log-probabilities.
    """

    def pairs() -> Iterator[tuple[LogProbabilities, LogProbabilities]]:
        for (token, one), (other_token, another) in zip(_positions(dense), _positions(other), strict=False):
            yield one, another
            if token != other_token:
                return

    return mean_kl(pairs())


def _positions(answer: Mapping[str, Any]) -> list[tuple[str, LogProbabilities]]:
    """Of each token: its text, and the log-probabilities of the likeliest tokens."""
    try:
        logprobs = answer["choices"][0]["logprobs"]
        if "content" in logprobs:
            return [
                (token["token"], {top["token"]: _finite(top["logprob"]) for top in token["top_logprobs"]})
                for token in logprobs["content"]
            ]
        return [
            (token, {text: _finite(value) for text, value in top.items()})
            for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
        ]
    except (LookupError, TypeError, AttributeError, ValueError):
        raise ValueError("the server gives no log-probabilities") from None


def _finite(value: float) -> float:
    if not -math.inf <= value <= 1e-6:
        raise ValueError(f"a log-probability of {value}")
    return value
