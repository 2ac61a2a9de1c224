"""The files that start an engine: one environment for every process, and a script each for one node, Slurm and Triton.

TensorRT-LLM has no flag that loads a further plugin library, and its C++ worker loads only its own. So the library is
preloaded (`LD_PRELOAD`): it registers its creators when it is loaded, in the Python process, in each MPI worker, in
`trtllm-serve` and in Triton's C++ backend alike. Python's workers find our modules through `PYTHONPATH`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from builder.config import EngineConfig
from plugins.common.templates import render

DIRECTORY = "launch"
GPUS_A_NODE = 8
PLUGIN_LIBRARY = "libtwofour_tensorrt.so"

TEMPLATE_DIRECTORY = Path(__file__).parent / "templates"


def write(
    out: Path,
    config: EngineConfig,
    serve: Sequence[str],
    container: str,
    backend: str,
    modules: bool,
    preload: bool,
) -> None:
    """Writes `out/launch/`. `serve` is trtllm-serve's command with `$engine` for the engine directory.

    `modules` is whether Python's workers import a module from the engine, `preload` whether a plugin library is needed.
    """
    ranks = config.tensor_parallel * config.pipeline_parallel
    tasks = min(ranks, GPUS_A_NODE)
    nodes = -(-ranks // tasks)
    values = {
        "command": shell(serve),
        "inline_command": " ".join(serve).replace("$engine", "$ENGINE"),
        "container": container,
        "backend": backend,
        "modules": modules,
        "preload": preload,
        "library": PLUGIN_LIBRARY,
        "ranks": ranks,
        "nodes": nodes,
        "tasks": tasks,
    }
    directory = out / DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("env.sh", "serve.sh", "slurm.sh", "triton.sh"):
        path = directory / name
        path.write_text(render(TEMPLATE_DIRECTORY, name, **values), encoding="utf8")
        path.chmod(0o644 if name == "env.sh" else 0o755)


def shell(command: Sequence[str]) -> str:
    """A command for a script, one option a line, each word in double quotes where it holds a variable."""
    lines: list[str] = []
    for word in command:
        quoted = f'"{word}"' if "$" in word else word
        if word.startswith("--") or not lines:
            lines.append(quoted)
        else:
            lines[-1] += f" {quoted}"
    return " \\\n  ".join(lines)
