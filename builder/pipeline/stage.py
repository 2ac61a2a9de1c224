"""A stage: one step of a build whose output the cache keeps under the hash of everything that determines it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.artifacts.cache import CachedOutput, key
from builder.artifacts.source_code import code_digest
from builder.context import BuildContext, Outputs
from builder.hardware import machine

CALIBRATION_TOOLS = ("twofour", "torch", "transformers", "nvidia-modelopt", "safetensors")
ENGINE_TOOLS = ("twofour", "torch", "transformers", "safetensors", "tensorrt-llm", "tensorrt")


@dataclass(frozen=True)
class Stage:
    """One row of the pipeline.

    until: the first value of --until that includes the stage
    enabled: whether the recipe requires it
    inputs: digests, by name, of the files that `run` reads; raises UserError where the recipe lacks one
    config: the part of the recipe and of the machine that changes the output; a JSON value
    run: writes the output into `out`; `work` outlives a kill, and `run` resumes from it
    code: modules that `run` calls; their source and that of all they import is part of the key
    tools: packages whose versions are part of the key
    """

    name: str
    enabled: Callable[[BuildContext], bool]
    inputs: Callable[[BuildContext, Outputs], Mapping[str, str]]
    config: Callable[[BuildContext, Outputs], Any]
    run: Callable[[BuildContext, Outputs, Path, Path], None]
    code: tuple[str, ...]
    tools: tuple[str, ...] = CALIBRATION_TOOLS
    until: str = "checkpoint"
    after: Callable[[BuildContext, CachedOutput], None] | None = None  # prints what the user should know of the output


def run_stage(stage: Stage, context: BuildContext, outputs: Outputs, place: str = "") -> CachedOutput:
    """The stage's output: cached, or made now. `place` is its place in the build, for the progress line."""
    inputs, config = stage.inputs(context, outputs), stage.config(context, outputs)
    tools = machine.versions(*stage.tools)
    code = code_digest(stage.code, inspect.getsource(stage.run))
    description = {"inputs": dict(inputs), "config": config, "code": code, "tools": tools}
    context.console.print(f"{stage.name} ...{place}")
    output = context.cache.run(
        stage.name,
        key(stage.name, inputs, config, code, tools),
        description,
        lambda out, work: stage.run(context, outputs, out, work),
        wait=context.wait,
    )
    context.console.stage_done()
    context.console.print(f"{stage.name}: " + ("cached" if output.reused else f"{output.record['seconds']:.1f} s"))
    if stage.after:
        stage.after(context, output)
    return output
