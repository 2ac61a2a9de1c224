"""What the build's prefill of a prompt adds to a router's prediction: the loss it saves on held-out documents.

    python -m benchmarks.pruning.routing_texts TEXTS
    twofour build RECIPE --out OUT     # with a routing section whose prompts are TEXTS/learning.jsonl
    twofour deploy OUT
    python -m benchmarks.pruning.routing_second_stage OUT --texts TEXTS

Both engines measure each prompt's loss, as learning does. The predictor is fitted on the build's own prompts, held-out
ones too, with the features of the prompt alone and with each group of `routing_signals` added, and tested on prompts of
`serving.jsonl`. Writes `benchmarks/results/routing-second-stage-MODEL-MACHINE-DATE.json`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.environment import describe
from benchmarks.pruning.accuracy import RESULTS, write_result
from benchmarks.pruning.routing_serving import answer, open_engines, read_prompts
from benchmarks.pruning.routing_signals import GROUPS, Signals, read_signals
from calibration.routing.divergence import LogProbabilities
from calibration.routing.features import Features, unseen_features
from calibration.routing.predictor import fit
from calibration.routing.prefill import fit_prefill
from calibration.routing.prompts import cut_prompts, measure_losses
from calibration.routing.proof import resample_documents, saved_shares
from calibration.routing.router import Router
from plugins.common.errors import UserError

RESAMPLES = 5000
Floats = np.ndarray[Any, np.dtype[np.float64]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]
Pair = tuple[Any, Any]
"""Features [N, F] of the learned prompts, and of the served."""


@dataclass(frozen=True)
class Measured:
    """Prompts [N] of D documents: their losses (nats per token), and what the prefill gives.

    seconds: of the build's prefill of each prompt, and of its answer [N, 2]
    """

    tokens: list[tuple[int, ...]]
    documents: Numbers
    loss: Floats
    next_tokens: list[LogProbabilities]
    signals: list[Signals]
    seconds: Floats


def measure(engines: Mapping[str, Any], tokens: list[tuple[int, ...]], documents_N: Numbers, length: int) -> Measured:
    """Runs both engines on each prompt, with answers of at most `length` tokens."""
    dense, built = engines["dense"], engines["built"]
    losses = measure_losses(dense.logits, built.logits, tokens, [answer(dense, prompt, length) for prompt in tokens])
    times, signals = [], []
    for prompt in tokens:
        start = time.perf_counter()
        built_TV = built.logits(_batch(prompt))[0]
        middle = time.perf_counter()
        answer(built, prompt, length)
        times.append((middle - start, time.perf_counter() - middle))
        signals.append(read_signals(dense.logits(_batch(prompt))[0], built_TV, prompt))
    loss_N = np.array([loss.kl for loss in losses])
    return Measured(tokens, documents_N, loss_N, [loss.next_token for loss in losses], signals, np.array(times))


def _batch(prompt: Sequence[int]) -> Any:
    import torch

    return torch.tensor([prompt])


def feature_sets(tables: Features, text_WT: Any, learned: Measured, served: Measured) -> dict[str, Pair]:
    """By name: the features of the prompt alone, then those with more."""
    unseen_NF = unseen_features(tables, learned.tokens, text_WT, learned.documents)
    own = tables.with_text(text_WT)
    first = (unseen_NF, np.stack([own.extract(prompt) for prompt in served.tokens]))
    prefill = fit_prefill(learned.next_tokens, len(tables.surprisal_V))
    groups = {name: (_group(learned, keys), _group(served, keys)) for name, keys in GROUPS.items()}
    learned_ND, served_ND = (np.stack([prefill.extract(row) for row in each.next_tokens]) for each in (learned, served))
    added = {
        **groups,
        "next token's distribution": (learned_ND, served_ND),
        "next token's distribution and all of these": _joined(groups["all of these"], (learned_ND, served_ND)),
    }
    return {"prompt": first, **{name: _joined(first, pair) for name, pair in added.items()}}


def _group(measured: Measured, keys: Sequence[str]) -> Any:
    return np.array([[signals[key] for key in keys] for signals in measured.signals])


def _joined(first: Pair, second: Pair) -> Pair:
    return np.concatenate([first[0], second[0]], axis=1), np.concatenate([first[1], second[1]], axis=1)


def compare(sets: Mapping[str, Pair], learned: Measured, served: Measured) -> dict[str, Any]:
    """By set of features: the share of a random mix's loss that the router saves, and how much more than the first set.

    `saved` is the area between the curves, as `calibration.routing.proof` has it; `left_out` the same on the learned
    prompts, each left out of its own fit. Intervals of 95%: both routers on the same resamples of the documents.
    """
    resamples_BN = resample_documents(served.documents, RESAMPLES, seed=0)
    weights_BN = np.concatenate([np.ones((1, len(served.loss))), resamples_BN])
    rows: dict[str, Any] = {}
    saved: dict[str, Floats] = {}
    for name, (learned_NF, served_NF) in sets.items():
        fitted = fit(learned_NF, learned.loss)
        predicted_N = np.array([fitted.predictor.predict(row_F).loss for row_F in served_NF])
        saved[name] = saved_shares(predicted_N, served.loss, weights_BN)
        left_out = saved_shares(fitted.left_out_N, learned.loss, np.ones((1, len(learned.loss))))
        rows[name] = {
            "features": learned_NF.shape[1],
            "left_out": float(left_out[0]),
            "saved": _estimate(saved[name]),
            "more_than_prompt": _estimate(saved[name] - saved["prompt"]),
        }
    return {"rows": rows, "oracle": _estimate(saved_shares(served.loss, served.loss, weights_BN))}


def _estimate(values_B: Floats) -> dict[str, Any]:
    """The value, which comes first, and its interval from the resamples after it."""
    return {"value": float(values_B[0]), "interval": np.quantile(values_B[1:], [0.025, 0.975]).tolist()}


def run(build: Path, texts: Path) -> dict[str, Any]:
    """The comparison. Raises UserError for a build without a router or a deployment."""
    from calibration.config import Routing
    from calibration.data.windows import windows

    router, recipe = Router.load(build / "routing"), yaml.safe_load((build / "recipe.yaml").read_text())
    calibration, routing = recipe["calibration"], Routing(**recipe["routing"])
    engines = open_engines(build)
    length, seed = calibration["sequence_length"], calibration["seed"] + 1
    text = windows(str(texts / "learning.jsonl"), build / "checkpoint", length, routing.samples, seed)
    tokens, rows = read_prompts(build, texts / "serving.jsonl", length)
    _, documents_N = np.unique([row["kind"] + row["source"] for row in rows], return_inverse=True)
    learned = measure(engines, cut_prompts(text.tokens), text.documents, routing.max_new_tokens)
    served = measure(engines, tokens, documents_N, routing.max_new_tokens)
    prefill_ms, answer_ms = np.median(served.seconds, axis=0) * 1000
    return {
        "environment": describe(),
        "settings": {
            "model": Path(recipe["model"]).name,
            "learned": len(learned.tokens),
            "served": len(served.tokens),
            "documents": len(np.unique(served.documents)),
            "max_tokens": routing.max_new_tokens,
            "mean_loss": float(served.loss.mean()),
        },
        "milliseconds": {"prefill": float(prefill_ms), "answer": float(answer_ms)},
        **compare(feature_sets(router.features, text.tokens, learned, served), learned, served),
    }


def main() -> None:
    """Runs, prints the table and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning.routing_second_stage", description=__doc__)
    parser.add_argument("build", type=Path, metavar="OUT")
    parser.add_argument("--texts", type=Path, required=True, help="directory of learning.jsonl and serving.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the result file")
    arguments = parser.parse_args()
    try:
        result = run(arguments.build, arguments.texts)
    except UserError as error:
        sys.exit(f"error: {error}")
    for name, row in {**result["rows"], "oracle": {"saved": result["oracle"]}}.items():
        values = (row[key] for key in ("saved", "more_than_prompt") if key in row)
        cells = (
            f"{value['value']:6.1%} ({value['interval'][0]:.1%} to {value['interval'][1]:.1%})" for value in values
        )
        print(f"{name:50}", *(f"{cell:26}" for cell in cells))
    print(write_result(f"routing-second-stage-{result['settings']['model']}", result, arguments.out))


if __name__ == "__main__":
    main()
