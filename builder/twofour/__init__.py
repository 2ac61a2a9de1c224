"""twofour as a library: build a model, verify the files, load the engine, generate text.

    import twofour

    build = twofour.build("examples/docs-llama", preset="fp8-2of4", out="build/python")
    assert twofour.verify(build.out).ok
    llm = twofour.load(build.out)
    print(llm.generate(["A trigger is"], max_tokens=16))

Installed as the top-level package `twofour`; its source lies in `builder/twofour`. Importing it imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from plugins.common import defaults
from plugins.common.errors import GateError, UserError
from plugins.common.threads import let_threads_sleep

if TYPE_CHECKING:
    from builder.verify import Verification

    from .llm import LLM

__all__ = ["Build", "GateError", "UserError", "build", "load", "verify"]

let_threads_sleep()

Until = Literal["checkpoint", "engine", "evaluate", "benchmark", "deploy"]

try:
    __version__ = version("twofour")
except PackageNotFoundError:  # a checkout that is not installed
    __version__ = "unknown"


@dataclass(frozen=True)
class Build:
    """A finished build: its directory, and report/report.json as a dict."""

    out: Path
    report: dict[str, Any]


def build(
    model: str | Path,
    *,
    out: str | Path,
    preset: str | None = None,
    settings: Mapping[str, Any] | None = None,
    until: Until = "deploy",
    store: str | Path | None = None,
    gpu: str = defaults.GPU,
    quiet: bool = True,
) -> Build:
    """Builds `model` into the directory `out`, as `twofour build` does.

    `model` is a local directory, a Hugging Face id, or a recipe file. `settings` override recipe keys:
    `{"sparsity.method": "wanda"}`. `until` is the last stage to run, `store` the cache of stage outputs, `gpu` the card
    that times are predicted for. Progress goes to standard error unless `quiet`.
    Raises UserError for wrong input, and GateError where a gate of the recipe fails: then `out` and its report stay.
    """
    from builder import recipe
    from builder.console import Console
    from builder.pipeline.build import build as run
    from builder.pipeline.build import require_gates

    overrides = [f"{key}={json.dumps(value)}" for key, value in (settings or {}).items()]  # JSON is YAML
    loaded = recipe.load(str(model), preset, overrides)
    with Console(quiet=quiet) as console:
        report = run(loaded, Path(out), console, Path(store) if store else None, until, gpu)
    require_gates(report, Path(out))
    return Build(Path(out), report)


def verify(directory: str | Path, *, tensor_parallel: int = 1) -> Verification:
    """Checks a build or a checkpoint from its files alone, as `twofour verify` does; `ok`: all checks hold.

    Raises UserError where `directory` holds neither.
    """
    from builder.verify import verify as check

    return check(Path(directory), tensor_parallel=tensor_parallel)


def load(directory: str | Path) -> LLM:
    """Opens the engine of a build, or an engine directory.

    Raises UserError where there is none, or where its backend runs in a separate server (TensorRT-LLM).
    """
    from .llm import LLM

    return LLM(Path(directory))
