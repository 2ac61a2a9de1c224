"""Routing on a Triton server, between a model's dense engine and its build: the loss it saves and the budget.

    python -m benchmarks.pruning.routing_texts TEXTS
    twofour build RECIPE --out OUT     # with a routing section whose prompts are TEXTS/learning.jsonl
    twofour deploy OUT
    python -m benchmarks.pruning.routing_serving OUT --prompts TEXTS/serving.jsonl

Both engines first measure each prompt's loss in this process, as learning does: KL(dense || build) on the dense
engine's greedy answer. Then the server gets each prompt once, and after a restart many requests whose mix of texts
changes half-way. Writes `benchmarks/results/routing-serving-MACHINE-DATE.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.environment import describe
from benchmarks.pruning.accuracy import RESULTS, write_result
from benchmarks.pruning.routing_mix import Floats, Numbers, arrivals, equal_share, schedule, spent
from benchmarks.pruning.routing_requests import Answer, Gap, Prompt, check, read_metrics, send, serving
from benchmarks.pruning.routing_texts import read_texts
from calibration.routing.router import Router
from plugins.common.errors import UserError
from plugins.common.request import Request

SETTLE = 1.0  # seconds after which the metrics count every answer
WATCH = 25  # requests between two reads of the metrics
SEEN = (
    "measured_total",
    "measured_loss_sum",
    "shadows_dropped_total",
    "shadows_failed_total",
    "requests_total",
    "unpredicted_total",
    "seconds_total",
    "timed_total",
)


def first_gap(
    engines: Mapping[str, Any], variant: str, prompt: Prompt, own: tuple[int, ...], other: tuple[int, ...]
) -> float:
    """The gap in log-probability, nats, between the best token and `other`'s at the first position that differs."""
    import torch

    place = next((at for at, (a, b) in enumerate(zip(own, other, strict=False)) if a != b), len(other))
    if place == len(other):
        return float("inf")
    logits_V = engines[variant].logits(torch.tensor([[*prompt, *other[:place]]]))[0, -1].float()
    return float(logits_V.max() - logits_V[other[place]])


@dataclass(frozen=True)
class Prompts:
    """Held-out prompts [N]; for each the kind, the document, the loss in nats per token, and each engine's own answer.

    gap: see `check`. predicted: the losses that the router predicts
    """

    tokens: list[Prompt]
    kinds: list[str]
    documents: Numbers
    loss: Floats
    greedy: list[dict[str, tuple[int, ...]]]
    gap: Gap
    predicted: Floats


def read_prompts(build: Path, path: Path, length: int) -> tuple[list[Prompt], list[dict[str, str]]]:
    """A prompt of each row that has `length` tokens, cut as in training, and the rows."""
    from calibration.data.windows import windows
    from calibration.routing.prompts import cut_prompts

    rows = read_texts(path)
    text = windows(str(path), build / "checkpoint", length)
    _, first_N = np.unique(text.documents, return_index=True)  # one window of each row
    first_N = first_N[text.documents[first_N] < len(rows)]
    return cut_prompts(text.tokens[first_N], seed=1), [rows[at] for at in text.documents[first_N]]


def open_engines(build: Path) -> dict[str, Any]:
    """The engines of a deployed build and of its dense model, by variant. Raises UserError where there is none."""
    import twofour

    places = {"dense": build / "triton" / "llm_dense" / "engine", "built": build / "engine"}
    return {name: twofour.load(place).engine for name, place in places.items()}


def answer(engine: Any, prompt: Prompt, max_tokens: int) -> tuple[int, ...]:
    """The engine's greedy answer to one prompt alone."""
    return tuple(token.token for token in engine.generate([Request("0", prompt, max_tokens)]))


def measure(build: Path, router: Router, path: Path, length: int, max_tokens: int) -> Prompts:
    """Runs both engines on each prompt alone."""
    from calibration.routing.prompts import measure_losses

    (tokens, rows), engines = read_prompts(build, path, length), open_engines(build)
    greedy = [{name: answer(engine, prompt, max_tokens) for name, engine in engines.items()} for prompt in tokens]
    logits = (engine.logits for engine in engines.values())
    losses = measure_losses(*logits, tokens, [own["dense"] for own in greedy])
    _, documents_N = np.unique([row["source"] for row in rows], return_inverse=True)
    loss_N = np.array([loss.kl for loss in losses])
    pairs = zip(tokens, losses, strict=True)
    predicted_N = np.array([router.predict(prompt, loss.next_token).loss for prompt, loss in pairs])
    gap = partial(first_gap, engines)
    return Prompts(tokens, [row["kind"] for row in rows], documents_N, loss_N, greedy, gap, predicted_N)


def serve(build: Path, prompts: Prompts, order: Numbers, rate: float, max_tokens: int) -> dict[str, Any]:
    """Sends the prompts in this order to a new server; `cheap` is true for requests that the build answered."""
    course: list[dict[str, float]] = []
    sent = [prompts.tokens[at] for at in order]
    with serving(build) as server:

        def watch(number: int) -> None:
            if number % WATCH == 0:
                seen = read_metrics(server)
                gauges = {name: seen.get(name, 0.0) for name in ("threshold", "drift", "drift_alarm")}
                course.append({"request": number, **gauges})

        answers = send(server, sent, arrivals(len(order), rate).tolist(), max_tokens, watch)
        time.sleep(SETTLE)
        watch(0)
        metrics = read_metrics(server)
    course[-1]["request"] = len(order)
    return {
        "cheap": np.array([answer.variant == "built" for answer in answers]),
        "facts": {
            "requests": len(order),
            "checks": check(sent, answers, [prompts.greedy[at] for at in order], prompts.gap),
            "router": {name: metrics.get(name, 0.0) for name in SEEN},
            "seconds": _times(answers),
            "course": course,
        },
    }


def _times(answers: Sequence[Answer]) -> dict[str, float]:
    """Median and 99th percentile of the time to an answer, seconds."""
    middle, late = np.quantile([answer.seconds for answer in answers], [0.5, 0.99])
    return {"median": float(middle), "p99": float(late)}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both parts. Raises UserError for a build without a router or a deployment."""
    from calibration.config import Routing

    build: Path = arguments.build
    router, recipe = Router.load(build / "routing"), yaml.safe_load((build / "recipe.yaml").read_text())
    routing = Routing(**recipe["routing"])
    max_tokens, budget = routing.max_new_tokens, router.budget_kl
    print("measuring the losses ...", file=sys.stderr, flush=True)
    prompts = measure(build, router, arguments.prompts, recipe["calibration"]["sequence_length"], max_tokens)
    every = np.random.default_rng(0).permutation(len(prompts.tokens))
    print(f"{len(every)} prompts once ...", file=sys.stderr, flush=True)
    once = serve(build, prompts, every, arguments.rate, max_tokens)
    order = schedule(prompts.kinds, arguments.requests, "docs", arguments.share)
    print(f"{len(order)} requests whose mix changes ...", file=sys.stderr, flush=True)
    mixed = serve(build, prompts, order, arguments.rate, max_tokens)
    learned_N = prompts.predicted <= router.threshold
    settings = {"prompts": len(every), "requests": len(order), "rate": arguments.rate, "docs_share": arguments.share}
    return {
        "environment": describe(),
        "settings": {
            **settings,
            "model": Path(recipe["model"]).name,
            "budget_kl": budget,
            "learned_threshold": router.threshold,
            "learned_from": router.prompts,
            "shadow": routing.shadow,
            "features": routing.features,
            "max_tokens": max_tokens,
        },
        "mean_loss": {kind: float(prompts.loss[np.array(prompts.kinds) == kind].mean()) for kind in ("docs", "code")},
        "once": {
            **once["facts"],
            "equal_share": equal_share(once["cheap"], prompts.loss[every], prompts.documents[every]),
        },
        "changing mix": {
            **mixed["facts"],
            "spent": spent(mixed["cheap"], prompts.loss[order], budget),
            "learned_threshold_alone": spent(learned_N[order], prompts.loss[order], budget),
        },
    }


def main() -> None:
    """Runs, prints the comparison and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning.routing_serving", description=__doc__)
    parser.add_argument("build", type=Path, metavar="OUT")
    parser.add_argument("--prompts", type=Path, required=True, help="rows of text, source and kind")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second")
    parser.add_argument("--share", type=float, default=0.75, help="documentation's share of the first half")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the result file")
    arguments = parser.parse_args()
    try:
        result = run(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(
        json.dumps({"once": result["once"]["equal_share"], "changing mix": result["changing mix"]["spent"]}, indent=1)
    )
    print(write_result("routing-serving", result, arguments.out))


if __name__ == "__main__":
    main()
