"""python -m benchmarks.pruning.accuracy: 2:4 pruning methods, ours and others', on one model, the same tokens and seed.

Each method runs in its own process, one after the other; llm-compressor, which requires other versions, in its own
virtual environment, created here. The same code evaluates all results on held-out text. Writes the perplexity, seconds
and peak memory of each to `benchmarks/results/`. Seconds and memory cover loading the model to writing the pruned
weights; memory is the peak above the process's memory before, because imports differ.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from plugins.common.errors import UserError
from plugins.common.json_files import read_json, write_json

RESULTS = Path(__file__).parents[1] / "results"
LLMCOMPRESSOR = ("llmcompressor==0.14.*", "torch==2.13.0")
LINEARS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
METHODS = {  # a row of the table: the script that prunes, and what it calls the method
    "magnitude": ("prune_twofour", "magnitude"),
    "modelopt sparsegpt": ("prune_modelopt", "sparsegpt"),
    "llm-compressor sparsegpt": ("prune_llmcompressor", "sparsegpt"),
    "llm-compressor wanda": ("prune_llmcompressor", "wanda"),
    "twofour sparsegpt": ("prune_twofour", "sparsegpt"),
    "twofour reconstruct": ("prune_twofour", "reconstruct"),
}


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """The whole comparison. Raises UserError for a model without config.json."""
    layers, tokens = linear_layers(arguments.model), make_tokens(arguments, work)
    results: dict[str, Any] = {"dense": {}}
    directories = {"dense": str(arguments.model)}
    for name, (script, method) in METHODS.items():
        if arguments.only and name not in arguments.only:
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        python = environment_python(arguments.environment, LLMCOMPRESSOR) if "llm" in script else sys.executable
        out = work / name.replace(" ", "-")
        results[name] = prune(python, script, method, arguments.model, tokens, layers, out)
        directories[name] = str(out)
    for name, judged in judge(arguments, layers, directories).items():
        results[name] |= judged
    settings = {
        "model": str(arguments.model), "calibration": arguments.calibration, "evaluation": arguments.evaluation,
        "every": arguments.every, "samples": arguments.samples, "sequence_length": arguments.sequence_length,
        "seed": arguments.seed, "layers": len(layers), "pattern": "2:4", "threads": arguments.threads,
    }  # fmt: skip
    return {"environment": describe(), "settings": settings, "methods": results, "shares": _shares(results)}


def prune(
    python: str, script: str, method: str, model: Path, tokens: Path, layers: Sequence[str], out: Path
) -> dict[str, Any]:
    """Prunes the layers of a model into `out`, in a process; returns what the script measured."""
    metered = out.with_name(f"{out.name}.json")
    run_script(python, script, method, str(model), str(tokens), json.dumps(layers), str(out), str(metered))
    measured: dict[str, Any] = read_json(metered)
    return measured


def _shares(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of ours against each peer: perplexity increase, seconds and memory, as ratios."""
    ours = [name for name in results if name.startswith("twofour")]
    peers = [name for name in results if name not in ours and name != "dense"]
    return {
        f"{own} / {peer}": {
            "perplexity_increase": results[own]["perplexity_increase"] / results[peer]["perplexity_increase"],
            "seconds": results[own]["seconds"] / results[peer]["seconds"],
            "peak_above_start_bytes": results[own]["peak_above_start_bytes"] / results[peer]["peak_above_start_bytes"],
        }
        for own in ours
        for peer in peers
    }


def make_tokens(arguments: argparse.Namespace, work: Path) -> Path:
    """The file of the calibration tokens."""
    tokens = work / "tokens.npy"
    shape = (str(arguments.sequence_length), str(arguments.samples), str(arguments.seed))
    run_script(sys.executable, "make_tokens", str(arguments.model), arguments.calibration, *shape, str(tokens))
    return tokens


def judge(arguments: argparse.Namespace, layers: list[str], directories: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The accuracy of each model against the dense one on the evaluation text, by name."""
    print("judging ...", file=sys.stderr, flush=True)
    judged = run_script(
        sys.executable, "judge", str(arguments.model), arguments.evaluation, str(arguments.sequence_length),
        str(arguments.every), json.dumps(layers), *directories.values(),
    )  # fmt: skip
    return {name: json.loads(line) for name, line in zip(directories, judged.splitlines(), strict=True)}


def run_script(python: str, script: str, *arguments: str) -> str:
    """Runs a module of benchmarks/pruning/scripts with the environment of `python`; returns its standard output."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    if python == sys.executable:  # as the product runs; a peer keeps its own settings
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    done = subprocess.run(
        [python, "-m", f"benchmarks.pruning.scripts.{script}", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise UserError(f"'{script} {arguments[0]}' ended with {done.returncode}: {last_line(done.stderr)}")
    return done.stdout


def last_line(text: str) -> str:
    """The last that is not a warning: what an error ends with."""
    lines = [line for line in text.strip().splitlines() if not line.startswith("WARNING")]
    return (lines or ["no output"])[-1]


def environment_python(directory: Path, packages: Sequence[str]) -> str:
    """The interpreter of the environment that holds a peer's packages, made where it is missing."""
    python = directory / "bin" / "python"
    if not (directory / "complete").exists():
        print(f"installing {' '.join(packages)} into {directory} ...", file=sys.stderr, flush=True)
        venv.create(directory, with_pip=True, clear=True)
        done = subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"'{' '.join(packages)}' cannot be installed: {last_line(done.stderr)}")
        (directory / "complete").touch()
    return str(python)


def linear_layers(model: Path) -> list[str]:
    """The linear layers of all blocks. Raises UserError for a directory without config.json."""
    try:
        blocks = read_json(model / "config.json")["num_hidden_layers"]
    except OSError:
        raise UserError(f"'{model}' contains no config.json: give a model's directory") from None
    return [f"model.layers.{block}.{name}" for block in range(blocks) for name in LINEARS]


def write_result(name: str, results: dict[str, Any], out: Path) -> Path:
    """Writes a benchmark's values into `out`, under its name, the machine's and the day's."""
    environment = results["environment"]
    machine = re.sub(r"[^a-z0-9]+", "-", environment["processor"].lower()).strip("-") + f"-{environment['cores']}cores"
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}-{machine}-{datetime.date.today().isoformat()}.json"
    write_json(path, results)
    return path


def _table(results: dict[str, Any]) -> str:
    lines = [f"{'method':26}{'perplexity':>11}{'increase':>10}{'KL':>8}{'seconds':>9}{'peak MiB':>10}  2:4"]
    for name, row in results.items():
        cost = f"{row['seconds']:9.1f}{row['peak_above_start_bytes'] / 2**20:10.0f}" if "seconds" in row else " " * 19
        perplexity = row["built"]["perplexity"]
        judged = f"{perplexity:11.2f}{row['perplexity_increase']:10.1%}{row['kl']:8.4f}"
        lines.append(f"{name:26}{judged}{cost}  {'yes' if row['holds_2of4'] else 'no'}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the texts and what else each benchmark of pruned models takes."""
    parser.add_argument("--model", type=Path, default=Path("examples/docs-llama"))
    parser.add_argument("--calibration", default="examples/docs-llama/calibration.jsonl")
    parser.add_argument("--evaluation", default="examples/docs-llama/evaluation.jsonl")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="evaluate on every Nth sequence")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS)


def run_in_scratch(run: Callable[[argparse.Namespace, Path], dict[str, Any]], arguments: argparse.Namespace) -> Any:
    """`run` with a directory that is gone afterwards; a UserError ends the program in one line."""
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    try:
        with tempfile.TemporaryDirectory() as work:
            return run(arguments, Path(work))
    except UserError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    """Parses the command line, runs, prints the table and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning.accuracy", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--only", nargs="*", choices=list(METHODS), help="rows besides dense")
    parser.add_argument("--environment", type=Path, default=Path("build/peers/llmcompressor"))
    arguments = parser.parse_args()
    results = run_in_scratch(run, arguments)
    print(_table(results["methods"]))
    print(write_result("accuracy_peers", results, arguments.out))


if __name__ == "__main__":
    main()
