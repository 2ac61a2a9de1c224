"""python -m benchmarks.pruning.recovery TEXT: how much of one-shot pruning's loss a few minutes of recovery recover.

Prunes the model by the default method, distills the dense model into it on TEXT, and evaluates both on held-out text.
Writes perplexities, steps and seconds to `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from benchmarks.pruning import accuracy
from benchmarks.pruning.accuracy import judge, linear_layers, make_tokens
from plugins.common.json_files import read_json


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Prunes, recovers and evaluates, each in its own process."""
    model, length, minutes = str(arguments.model), str(arguments.sequence_length), str(arguments.minutes)
    layers, tokens = linear_layers(arguments.model), make_tokens(arguments, work)
    directories = {"dense": model, "pruned": str(work / "pruned"), "recovered": str(work / "recovered")}
    _, pruned, recovered = directories.values()
    accuracy.prune(sys.executable, "prune_twofour", "reconstruct", arguments.model, tokens, layers, work / "pruned")
    print("recovering ...", file=sys.stderr, flush=True)
    paths, report = (model, pruned, arguments.text), work / "recovery.json"
    accuracy.run_script(sys.executable, "recover_twofour", *paths, length, minutes, recovered, str(report))
    results: dict[str, Any] = judge(arguments, layers, directories)
    lost, left = (results[name]["perplexity_increase"] for name in ("pruned", "recovered"))
    fields = ("model", "calibration", "evaluation", "every", "minutes")
    settings = {name: str(getattr(arguments, name)) for name in fields}
    recovery = read_json(report)
    facts = {"environment": describe(), "settings": settings, "recovery": recovery}
    return {**facts, **results, "taken_back": 1 - left / lost}


def main() -> None:
    """Parses the command line, runs, prints the result and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning.recovery", description=__doc__)
    parser.add_argument("text", help="training text, in the formats of recovery.data")
    parser.add_argument("--minutes", type=float, default=15)
    accuracy.add_arguments(parser)
    arguments = parser.parse_args()
    results = accuracy.run_in_scratch(run, arguments)
    perplexity = {name: results[name]["built"]["perplexity"] for name in ("dense", "pruned", "recovered")}
    print(", ".join(f"{name} {value:.2f}" for name, value in perplexity.items()))
    zeros = "all layers 2:4" if results["recovered"]["holds_2of4"] else "ZEROS WERE LOST"
    steps, seconds = results["recovery"]["steps"], results["recovery"]["seconds"]
    print(f"{results['taken_back']:.0%} of the loss taken back, {zeros}, {steps} steps in {seconds:.0f} s")
    print(accuracy.write_result("recovery", results, arguments.out))


if __name__ == "__main__":
    main()
