"""The files that start an engine: one environment for every process, and a script each for one node, Slurm and Triton.

TensorRT-LLM has no flag that loads a further plugin library, and its C++ worker loads only its own. So the library is
preloaded (`LD_PRELOAD`): it registers its creators when it is loaded, in the Python process, in each MPI worker, in
`trtllm-serve` and in Triton's C++ backend alike. Python's workers find our modules through `PYTHONPATH`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from builder.config import EngineConfig

DIRECTORY = "launch"
GPUS_A_NODE = 8
PLUGIN_LIBRARY = "libtwofour_tensorrt.so"

_ENVIRONMENT = """\
# What every process that runs this engine needs. Source it; do not run it.
engine=$(cd "$(dirname "${{BASH_SOURCE[0]}}")/.." && pwd)
{modules}{preload}"""

_MODULES = """\
export PYTHONPATH="$engine${{PYTHONPATH:+:$PYTHONPATH}}"  # where Python's workers find the model's module
"""

_PRELOAD = """\
# The plugin library registers itself on loading. TWOFOUR_PLUGIN_LIBRARY names another copy, built for this machine.
library=${{TWOFOUR_PLUGIN_LIBRARY:-$engine/{library}}}
if [ ! -f "$library" ]; then
  echo "'$library' is missing: build it with 'twofour plugins build', or set TWOFOUR_PLUGIN_LIBRARY" >&2
  exit 2
fi
export LD_PRELOAD="$library${{LD_PRELOAD:+:$LD_PRELOAD}}"
"""

_SERVE = """\
#!/usr/bin/env bash
# Serves the engine at http://$HOST:$PORT/v1 from one node with {ranks} GPU{s}.
set -euo pipefail
source "$(dirname "${{BASH_SOURCE[0]}}")/env.sh"
exec {command} \\
  --host "${{HOST:-127.0.0.1}}" --port "${{PORT:-8000}}" "$@"
"""

_SLURM = """\
#!/usr/bin/env bash
# Serves the engine from {nodes} node{s} under Slurm: sbatch {name}. One task a rank.
#SBATCH --job-name=twofour
#SBATCH --nodes={nodes}
#SBATCH --ntasks={ranks}
#SBATCH --ntasks-per-node={tasks}
#SBATCH --gpus-per-node={tasks}
# ENGINE: this engine's directory, at a path without spaces that every node sees.
# CONTAINER_IMAGE: {container}, or one made from it (pyxis); unset to run on the nodes' own software.
set -euo pipefail
: "${{ENGINE:?set ENGINE to the engine directory}}"
srun --mpi=pmix --kill-on-bad-exit=1 --export=ALL \\
  ${{CONTAINER_IMAGE:+--container-image="$CONTAINER_IMAGE" --container-mounts="$ENGINE:$ENGINE"}} \\
  bash -c '. "$ENGINE/launch/env.sh" && exec trtllm-llmapi-launch {command} --host 0.0.0.0 --port "${{PORT:-8000}}"'
"""

_TRITON = """\
#!/usr/bin/env bash
# Starts Triton on the model repository $1 (what triton/make_repository.py wrote). {ranks} process{es}, one a GPU.
set -euo pipefail
source "$(dirname "${{BASH_SOURCE[0]}}")/env.sh"
repository=${{1:?name the model repository}}
shift
{command}
"""

_TRITON_ALONE = 'exec tritonserver --model-repository="$repository"{options} "$@"'

# As NVIDIA's launch_triton_server.py does. The C++ backend wants a server a rank, of which the first answers; the
# others load the engine's model alone, and Python's shared memory goes by another name in each.
_TRITON_CPP = """\
command=(mpirun --allow-run-as-root)
for ((rank = 0; rank < {ranks}; rank++)); do
  command+=(-n 1 -x LD_PRELOAD -x PYTHONPATH tritonserver --model-repository="$repository")
  command+=(--disable-auto-complete-config "--backend-config=python,shm-region-prefix-name=prefix${{rank}}_")
  [ "$rank" = 0 ] || command+=(--model-control-mode=explicit --load-model=tensorrt_llm)
  command+=("$@" :)
done
unset "command[-1]"
exec "${{command[@]}}\""""

# One server, whose LLM hands its work to the other ranks.
_TRITON_LLM = """\
exec mpirun --allow-run-as-root --oversubscribe -n {ranks} -x LD_PRELOAD -x PYTHONPATH \\
  trtllm-llmapi-launch tritonserver --model-repository="$repository" "$@\""""


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
    preloaded = _PRELOAD.format(library=PLUGIN_LIBRARY) if preload else ""
    pages: Mapping[str, str] = {
        "env.sh": _ENVIRONMENT.format(modules=_MODULES.format() if modules else "", preload=preloaded),
        "serve.sh": _SERVE.format(command=shell(serve), ranks=ranks, s="s" if ranks > 1 else ""),
        "slurm.sh": _SLURM.format(
            name="slurm.sh",
            command=" ".join(serve).replace("$engine", "$ENGINE"),
            container=container,
            nodes=nodes,
            ranks=ranks,
            tasks=tasks,
            s="s" if nodes > 1 else "",
        ),
        "triton.sh": _TRITON.format(command=_triton(ranks, backend), ranks=ranks, es="es" if ranks > 1 else ""),
    }
    directory = out / DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages.items():
        path = directory / name
        path.write_text(text, encoding="utf8")
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


def _triton(ranks: int, backend: str) -> str:
    """How tritonserver is started for so many ranks of a backend."""
    if ranks == 1:  # the LLM API's model is completed from its model.yaml; NVIDIA's script keeps that off for the other
        return _TRITON_ALONE.format(options=" --disable-auto-complete-config" if backend == "tensorrt" else "")
    return (_TRITON_CPP if backend == "tensorrt" else _TRITON_LLM).format(ranks=ranks)
