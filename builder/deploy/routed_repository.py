"""Writes a Triton repository of a router in front of two models: the dense model and the build. Torch engines only."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from builder.artifacts.cache import default_store
from builder.config import DeployConfig
from builder.deploy import request_schema
from builder.deploy.rendering import TEMPLATE_DIRECTORY, relative, replace
from builder.deploy.repository import write_repository
from builder.engines.registry import engine_facts
from calibration.routing.router import Router
from plugins.common.errors import UserError
from plugins.common.templates import render

NAMES = ("dense", "built")


def write_routed_repository(engine_dir: Path, dense: Path, router_dir: Path, out: Path, config: DeployConfig) -> None:
    """Writes `out/<model_name>`, the router, and `out/<model_name>_dense` and `_built`, the models behind it.

    `dense` is the unpruned 16-bit model, a Hugging Face directory: its engine, with the limits of the engine at
    `engine_dir`, is written into its model's directory. Raises UserError for options that a router does not have, and
    for a router of other variants.
    """
    for option in ("response_cache", "dynamic_batching"):
        if getattr(config, option):
            raise UserError(f"{option} is for one engine, and the build has a router", "drop the option")
    if config.streaming is False:
        raise UserError("a router streams, and streaming is off", "drop --no-streaming")
    router = Router.load(router_dir)
    if router.variants != NAMES:
        raise UserError(f"the router in '{router_dir}' chooses between {', '.join(router.variants)}", "build again")
    facts = engine_facts(engine_dir)
    models = {name: f"{config.model_name}_{name}" for name in NAMES}
    for name, path in zip(NAMES, ("engine", config.engine_path), strict=True):
        own = config.model_copy(update={"model_name": models[name], "engine_path": path})
        write_repository(engine_dir, out, own)
    _build_dense(dense, out / models["dense"] / "engine", facts)
    model = out / config.model_name
    capacity = facts["max_batch_size"] + config.max_queue_size
    pages = {
        "config.pbtxt": render(
            TEMPLATE_DIRECTORY,
            "router_config.pbtxt",
            config=config,
            engine_path=config.engine_path or relative(engine_dir, model, out.parent),
            router_path=config.router_path or relative(router_dir, model, out.parent),
            variants=json.dumps({name: [models[name], capacity] for name in NAMES}),
            inputs=[(name, field) for field in request_schema.INPUTS for name in field.names],
            outputs=request_schema.OUTPUTS,
        ),
        "1/model.py": render(TEMPLATE_DIRECTORY, "router_model.py"),
    }
    replace(model, pages)


def state_file(build_id: str) -> Path:
    """Where a router of this build keeps its state unless another place is named."""
    return default_store() / "routing" / f"{build_id[:16]}.json"


def _build_dense(dense: Path, out: Path, facts: dict[str, Any]) -> None:
    from builder.engines.torch_backend import artifact

    limits = {field.name: facts[field.name] for field in fields(artifact.Limits) if field.name in facts}
    artifact.build(dense, out, artifact.Limits(**limits))
