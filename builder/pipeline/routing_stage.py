"""The stage that learns and proves a router between the dense model and the build."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from itertools import compress
from pathlib import Path
from typing import Any

from builder.artifacts.cache import digest_of
from builder.context import BuildContext, Outputs, data_digest
from builder.pipeline.reference_build import reference_engine
from builder.pipeline.stage import ENGINE_TOOLS, Stage
from plugins.common.errors import UserError
from plugins.common.files import sha256_once
from plugins.common.json_files import write_json

HELD_OUT = 0.3  # share of the documents
LEAST_PROMPTS = 16  # on each side of the split


def _data(context: BuildContext) -> str:
    data = context.routing.prompts or context.recipe.calibration.data
    if data is None:
        raise UserError("routing.prompts is not set", "set it, for example --set routing.prompts=prompts.jsonl")
    return data


def _inputs(context: BuildContext, outputs: Outputs) -> Mapping[str, str]:
    engine, other = outputs.get("reference") or outputs["engine"], _reference(context)
    digests = {"model": context.model_digest, "engine": engine.digest, "data": data_digest(_data(context))}
    if other:
        digests["reference"] = digest_of({path.name: sha256_once(path) for path in other.iterdir() if path.is_file()})
    return digests


def _reference(context: BuildContext) -> Path | None:
    """The other build's engine; None for the dense model."""
    return reference_engine(context.routing, context.model_digest)


def _run(context: BuildContext, outputs: Outputs, out: Path, work: Path) -> None:
    """router/, and routing.json: the report's `routing`."""
    import numpy as np

    from builder.engines import registry
    from calibration.routing.features import fit_features, unseen_features
    from calibration.routing.predictor import fit
    from calibration.routing.prompts import seen_shares
    from calibration.routing.proof import choose_threshold, prove
    from calibration.routing.router import Router, histograms

    routing, model = context.routing, context.model
    engine = (outputs.get("reference") or outputs["engine"]).path
    windows, prompts = _prompts(context)
    other, built = _reference(context), registry.load(engine)
    dense = registry.load(other) if other else registry.load_dense(model, engine)
    variants = ("reference" if other else "dense", "built")
    losses = _losses(dense, built, prompts, routing.max_new_tokens, context)
    loss_N = np.array([loss.kl for loss in losses])
    held_N = _held_out(windows.documents)
    training, held_out = (list(compress(prompts, kept_N)) for kept_N in (~held_N, held_N))
    text, training_loss_N = windows.tokens[~held_N], loss_N[~held_N]
    features = fit_features(text, *_vocabulary(model))
    features_NF = unseen_features(features, training, text, windows.documents[~held_N])
    prefill = None
    if routing.features == "prefill":
        prefill, added_ND = _prefill(list(compress(losses, ~held_N)), len(features.surprisal_V))
        features_NF = np.concatenate([features_NF, added_ND], axis=1)
    fitted = fit(features_NF, training_loss_N)
    threshold = choose_threshold(fitted.left_out_N, training_loss_N, routing.budget.kl)
    edges, reference_FB = histograms(features_NF)
    identity = hashlib.sha256("".join([*_inputs(context, outputs).values(), routing.features]).encode()).hexdigest()
    router = Router(
        features, fitted.predictor, identity, variants, routing.budget.kl, threshold, edges, reference_FB,
        prompts=len(training), seen=seen_shares(losses), prefill=prefill,
    )  # fmt: skip
    predicted_N, microseconds = _timed(router, held_out, list(compress(losses, held_N)))
    proof = prove(predicted_N, loss_N[held_N], windows.documents[held_N])
    cheap_N = predicted_N <= threshold
    router.save(out / "router")
    write_json(
        out / "routing.json",
        {
            **proof,
            "features": routing.features,
            "variants": list(variants),
            "budget_kl": routing.budget.kl,
            "threshold": threshold,
            "share": float(cheap_N.mean()),
            "loss": float((loss_N[held_N] * cheap_N).mean()),
            "disagreement": float(np.mean([loss.disagreement for loss in losses])),
            "prompts": {"trained": len(training), "held_out": len(held_out)},
            "controller_us": microseconds,
            "decision": _decision(proof["gate"], threshold, routing.budget.kl),
        },
    )


def _prompts(context: BuildContext) -> Any:
    """Windows of the text, and a prompt of each."""
    from calibration.data.windows import windows
    from calibration.routing.prompts import cut_prompts

    calibration = context.recipe.calibration
    text = windows(
        _data(context), context.model, calibration.sequence_length, context.routing.samples, calibration.seed + 1,
        calibration.chat_template, "routing.samples",
    )  # fmt: skip
    return text, cut_prompts(text.tokens)


def _losses(dense: Any, built: Any, prompts: Any, max_new_tokens: int, context: BuildContext) -> Any:
    """Both engines on the dense engine's greedy answers."""
    from calibration.routing.prompts import measure_losses
    from plugins.common.request import Request, tokens_by_request

    requests = [Request(str(i), prompt, max_new_tokens) for i, prompt in enumerate(prompts)]
    answers = tokens_by_request(dense.generate(requests), len(requests))
    return measure_losses(dense.logits, built.logits, prompts, answers, context.console.progress)


def _held_out(documents: Any) -> Any:
    """Which prompts prove the router, bool [N]: those of some documents, drawn by number. Raises UserError for few."""
    import numpy as np

    numbers = np.unique(documents)
    chosen = np.random.default_rng(0).permutation(numbers)[: round(HELD_OUT * len(numbers))]
    held_N = np.isin(documents, chosen)
    if min(held_N.sum(), (~held_N).sum()) < LEAST_PROMPTS:
        raise UserError(f"{len(documents)} prompts of {len(numbers)} documents do not prove a router", "add text")
    return held_N


def _vocabulary(model: Path) -> tuple[Any, list[str]]:
    """The input embedding [V, K] float32, and the text of each token."""
    from calibration.data.tokenizer import load_tokenizer
    from calibration.model.weights import Weights

    embedding = Weights(model).read("model.embed_tokens.weight").float().numpy()
    tokenizer = load_tokenizer(model)
    return embedding, [tokenizer.decode([token]) for token in range(min(len(tokenizer), len(embedding)))]


def _prefill(losses: Any, vocabulary: int) -> tuple[Any, Any]:
    """The components of the prompts' next tokens on the build, and the features [N, D] of each prompt."""
    import numpy as np

    from calibration.routing.prefill import fit_prefill

    prefill = fit_prefill([loss.next_token for loss in losses], vocabulary)
    return prefill, np.stack([prefill.extract(loss.next_token) for loss in losses])


def _timed(router: Any, prompts: Any, losses: Any) -> tuple[Any, float]:
    """The predicted losses [N], and the median time of one prediction without the prefill, microseconds."""
    import numpy as np

    predicted, times = [], []
    for prompt, loss in zip(prompts, losses, strict=True):
        began = time.perf_counter()
        predicted.append(router.predict(prompt, loss.next_token).loss)
        times.append(time.perf_counter() - began)
    return np.array(predicted), round(1e6 * float(np.median(times)), 1)


def _decision(gate: dict[str, Any], threshold: float, budget: float) -> dict[str, str]:
    """Which engines a deployment serves, and why."""
    if not gate["passed"]:
        return {"serve": "dense", "reason": f"{gate['message']}: one engine is kept"}
    if threshold < 0:
        return {"serve": "dense", "reason": f"no share of the prompts keeps a loss of {budget:g} nats per token"}
    return {"serve": "router", "reason": gate["message"]}


ROUTING = Stage(
    name="routing",
    until="evaluate",
    enabled=lambda context: context.recipe.routing is not None,
    inputs=_inputs,
    config=lambda context, outputs: {
        "routing": context.routing.model_dump(mode="json"),
        "sequence_length": context.recipe.calibration.sequence_length,
        "seed": context.recipe.calibration.seed,
        "chat_template": context.recipe.calibration.chat_template,
    },
    run=_run,
    code=("builder.pipeline.routing_stage",),
    tools=ENGINE_TOOLS,
)
