"""Writes a Triton repository of a router in front of two models: the dense one or another build, and the build.

Torch engines only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from builder.artifacts.cache import default_store
from builder.config import DeployConfig
from builder.deploy.rendering import relative
from builder.deploy.repository import write_model, write_repository
from builder.engines.registry import engine_facts
from calibration.routing.router import Router
from plugins.common.errors import UserError

VARIANTS = (("dense", "built"), ("reference", "built"))


def write_routed_repository(
    engine_dir: Path, reference: Path, router_dir: Path, out: Path, config: DeployConfig
) -> None:
    """Writes `out/<model_name>`, the router, and the models behind it: `_built`, and `_dense` or `_reference`.

    `reference` is the unpruned 16-bit model, a Hugging Face directory, whose engine, with the limits of the engine at
    `engine_dir`, is written into its model's directory; or the engine of another build, which stays where it is. The
    router's variants decide which. Raises UserError for options that a router does not have, and for a router of other
    variants.
    """
    for option in ("response_cache", "dynamic_batching"):
        if getattr(config, option):
            raise UserError(f"{option} is for one engine, and the build has a router", "drop the option")
    if config.streaming is False:
        raise UserError("a router streams, and streaming is off", "drop --no-streaming")
    router = Router.load(router_dir)
    if router.variants not in VARIANTS:
        raise UserError(f"the router in '{router_dir}' chooses between {', '.join(router.variants)}", "build again")
    facts = engine_facts(engine_dir)
    reference_facts = facts if "dense" in router.variants else _reference_facts(reference, facts)
    models = {name: f"{config.model_name}_{name}" for name in router.variants}
    first, built = (config.model_copy(update={"model_name": name}) for name in models.values())
    write_repository(engine_dir, out, built)
    if "dense" in models:
        write_repository(engine_dir, out, first.model_copy(update={"engine_path": "engine"}))
        _build_dense(reference, out / models["dense"] / "engine", facts)
    else:
        write_repository(reference, out, first.model_copy(update={"engine_path": str(reference.resolve())}))
    model = out / config.model_name
    capacities = {
        name: own["max_batch_size"] + config.max_queue_size
        for name, own in zip(models, (reference_facts, facts), strict=True)
    }
    write_model(
        model,
        "router_",
        config=config,
        engine_path=config.engine_path or relative(engine_dir, model, out.parent),
        router_path=config.router_path or relative(router_dir, model, out.parent),
        variants=json.dumps({name: [models[name], capacities[name]] for name in models}),
    )


def state_file(build_id: str) -> Path:
    """Where a router of this build keeps its state unless another place is named."""
    return default_store() / "routing" / f"{build_id[:16]}.json"


def _reference_facts(reference: Path, built: dict[str, Any]) -> dict[str, Any]:
    """engine.json of the other build. Raises UserError if it rejects requests that this build accepts."""
    facts = engine_facts(reference)
    if facts["max_seq_len"] < built["max_seq_len"]:
        raise UserError(
            f"the engine '{reference}' takes {facts['max_seq_len']} tokens, and this build's {built['max_seq_len']}",
            "build both with the same engine.max_seq_len",
        )
    return facts


def _build_dense(dense: Path, out: Path, facts: dict[str, Any]) -> None:
    from builder.engines.torch_backend import artifact

    limits = {name: facts[name] for name in artifact.LIMITS if name in facts}
    artifact.build(dense, out, artifact.Limits(**limits))
