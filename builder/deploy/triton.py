"""Writes a Triton model repository that serves an engine. Imports no torch."""

from __future__ import annotations

import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

from builder.deploy import protocol
from builder.deploy.config import DeployConfig
from builder.engines.backends import engine_facts
from plugins.errors import UserError


def write_repository(engine_dir: Path, out: Path, config: DeployConfig) -> None:
    """Writes `out/<model_name>/{config.pbtxt, 1/model.py}`, whose model serves the engine at `engine_dir`.

    The repository names the engine by a path relative to itself where both lie in one directory (so that a build can be
    moved or mounted elsewhere), else by an absolute one. Raises UserError for a directory that is no engine, a backend
    that Triton's Python backend does not run, and options that Triton cannot combine.
    """
    engine = engine_facts(engine_dir)
    if engine.get("backend") != "torch":
        raise UserError(
            f"'{engine_dir}' is a {engine.get('backend')} engine: Triton's Python backend serves torch engines here, "
            "TensorRT-LLM's own backend serves that one"
        )
    if config.streaming and config.response_cache:
        raise UserError(
            "Triton cannot cache the responses of a streaming (decoupled) model: drop --streaming or --response-cache"
        )
    streaming = config.streaming if config.streaming is not None else not config.response_cache
    pages = {
        "config.pbtxt": _render(
            "config.pbtxt",
            config=config,
            streaming=streaming,
            max_batch_size=engine["max_batch_size"] if config.dynamic_batching else 0,
            engine_path=config.engine_path or _path_from(out / config.model_name, engine_dir),
            inputs=[(name, field) for field in protocol.INPUTS for name in field.names],
            outputs=protocol.OUTPUTS,
        ),
        "1/model.py": _render("model.py"),
    }
    _replace(out / config.model_name, pages)


def _path_from(model: Path, engine_dir: Path) -> str:
    model, engine_dir = model.resolve(), engine_dir.resolve()
    together = engine_dir.is_relative_to(model.parent.parent)
    return os.path.relpath(engine_dir, model) if together else str(engine_dir)


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    environment.filters["quoted"] = lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return environment.get_template(f"{template}.jinja").render(version=version("twofour"), **values)


def _replace(model: Path, pages: dict[str, str]) -> None:
    """Writes the model beside its place and moves it there, so that no server ever reads half of it."""
    model.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=model.parent) as scratch:
        new = Path(scratch) / model.name
        for name, text in pages.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(text, encoding="utf8")
        if model.exists():
            if not (model / "config.pbtxt").is_file():
                raise UserError(
                    f"'{model}' holds something other than a Triton model: remove it or choose another --model-name"
                )
            shutil.move(model, Path(scratch) / "old")
        new.rename(model)
