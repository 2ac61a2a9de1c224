"""Writes a Triton model repository that serves an engine. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from builder.config import DeployConfig
from builder.deploy import request_schema, trtllm_repository
from builder.deploy.rendering import TEMPLATE_DIRECTORY, relative, replace
from builder.engines.registry import engine_facts
from plugins.common.errors import UserError
from plugins.common.templates import render


def write_repository(engine_dir: Path, out: Path, config: DeployConfig) -> None:
    """Writes `out/<model_name>/{config.pbtxt, 1/model.py}`, whose model serves the torch engine at `engine_dir`.

    For an engine of TensorRT-LLM it writes `out/make_repository.py` (see tensorrt_llm.py). The engine is named by a
    path relative to the repository where both lie in one directory, so that a build can be moved or mounted elsewhere,
    else by an absolute one. Raises UserError for what is not an engine, and for options that Triton cannot combine.
    """
    engine = engine_facts(engine_dir)
    backend = engine.get("backend")
    if backend not in ("torch", *trtllm_repository.TEMPLATES) or "max_batch_size" not in engine:
        raise UserError(f"'{engine_dir}' has a foreign engine.json (backend '{backend}'): name OUT/engine of a build")
    if backend in trtllm_repository.TEMPLATES:
        trtllm_repository.write_repository(engine_dir, engine, out, config)
        return
    if config.streaming and config.response_cache:
        raise UserError(
            "Triton cannot cache the responses of a streaming (decoupled) model: drop --streaming or --response-cache"
        )
    if not re.fullmatch(r"\w[\w.-]*", config.model_name, re.ASCII):
        raise UserError(f"'{config.model_name}' cannot name a model: use letters, digits, '_', '-' and '.'")
    model = out / config.model_name
    if model.exists() and not (model / "config.pbtxt").is_file():
        raise UserError(f"'{model}' holds something other than a Triton model: remove it or set another --model-name")
    write_model(
        model,
        "",
        config=config,
        streaming=not config.response_cache if config.streaming is None else config.streaming,
        max_batch_size=engine["max_batch_size"] if config.dynamic_batching else 0,
        engine_path=config.engine_path or relative(engine_dir, model, out.parent),
    )


def write_model(model: Path, kind: str, **values: Any) -> None:
    """Writes the two files of the model in `model`, from the templates whose names begin with `kind`."""
    inputs = [(name, field) for field in request_schema.INPUTS for name in field.names]
    settings = {"inputs": inputs, "outputs": request_schema.OUTPUTS, **values}
    config = render(TEMPLATE_DIRECTORY, f"{kind}config.pbtxt", **settings)
    replace(model, {"config.pbtxt": config, "1/model.py": render(TEMPLATE_DIRECTORY, f"{kind}model.py")})
