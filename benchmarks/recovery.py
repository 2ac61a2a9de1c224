"""python -m benchmarks.recovery TEXT: how much of one-shot pruning's loss a recovery of some minutes takes back.

Prunes the model by the default method, distills the dense model into it on TEXT, and judges both by text that none of
them saw. Writes perplexities, steps and seconds to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.accuracy_peers import RESULTS, linear_layers, run_script, write_result
from benchmarks.environment import describe
from plugins.errors import UserError


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Prunes, recovers and judges in processes of their own."""
    model, length = str(arguments.model), str(arguments.sequence_length)
    layers = json.dumps(linear_layers(arguments.model))
    tokens, pruned, recovered = (str(work / name) for name in ("tokens.npy", "pruned", "recovered"))
    run_script(sys.executable, "make_tokens.py", model, arguments.calibration, length, "128", "0", tokens)
    run_script(sys.executable, "prune_twofour.py", "reconstruct", model, tokens, layers, pruned, f"{work}/meter.json")
    print("recovering ...", file=sys.stderr, flush=True)
    report = f"{work}/recovery.json"
    options = (arguments.text, length, str(arguments.minutes))
    run_script(sys.executable, "recover.py", model, pruned, *options, recovered, report)
    directories = {"dense": model, "pruned": pruned, "recovered": recovered}
    judged = run_script(
        sys.executable, "judge.py", model, arguments.evaluation, length, layers, *directories.values()
    ).splitlines()
    found = {name: json.loads(line) for name, line in zip(directories, judged, strict=True)}
    lost, left = (found[name]["perplexity_increase"] for name in ("pruned", "recovered"))
    settings = {name: str(getattr(arguments, name)) for name in ("model", "calibration", "evaluation", "minutes")}
    recovery = json.loads(Path(report).read_text())
    return {
        "environment": describe(),
        "settings": settings,
        "recovery": recovery,
        **found,
        "taken_back": 1 - left / lost,
    }


def main() -> None:
    """Parses the command line, runs, prints the result and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    parser.add_argument("text", help="what recovery trains on: a file as recovery.data takes it")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--model", type=Path, default=Path("examples/docs-llama"))
    parser.add_argument("--calibration", default="examples/docs-llama/calibration.jsonl")
    parser.add_argument("--evaluation", default="examples/docs-llama/evaluation.jsonl")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    try:
        with tempfile.TemporaryDirectory() as work:
            found = run(arguments, Path(work))
    except UserError as error:
        sys.exit(f"error: {error}")
    perplexity = {name: found[name]["built"]["perplexity"] for name in ("dense", "pruned", "recovered")}
    print(", ".join(f"{name} {value:.2f}" for name, value in perplexity.items()))
    zeros = "all layers 2:4" if found["recovered"]["holds_2of4"] else "ZEROS WERE LOST"
    steps, seconds = found["recovery"]["steps"], found["recovery"]["seconds"]
    print(f"{found['taken_back']:.0%} of the loss taken back, {zeros}, {steps} steps in {seconds:.0f} s")
    print(write_result("recovery", found, arguments.out))


if __name__ == "__main__":
    main()
