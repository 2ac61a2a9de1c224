"""The loss of a model with 2:4 in several shares of its weights, on its own held-out text and on text of another kind.

    python -m benchmarks.pruning.fractions RECIPE --model NAME --fraction 25% --fraction 50% --fraction 100% \
        --text "package descriptions=other.jsonl"

Builds the recipe up to its evaluation with each `sparsity.fraction`, and evaluates each build again on each text.
Writes perplexities, intervals, KL and agreement to `benchmarks/results/`; stages are reused from the store.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from benchmarks.pruning.accuracy import RESULTS, last_line, write_result
from plugins.common.errors import UserError
from plugins.common.json_files import read_json

COMMAND = (sys.executable, "-c", "from builder.cli.commands import main; main()")
GATE_FAILED = 1  # exit status of a build whose report is whole
OWN = "evaluation"  # the recipe's own accuracy.data


def run(recipe: Path, fractions: Sequence[str], texts: Mapping[str, str], store: Path | None) -> dict[str, Any]:
    """{fraction: {text: accuracy}}, and the settings they hold for. Raises UserError where a build fails."""
    results: dict[str, Any] = {fraction: {} for fraction in fractions}
    settings: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="twofour-fractions-") as work:
        for fraction in fractions:
            for number, (name, data) in enumerate({OWN: "", **texts}.items()):
                overrides = [f"sparsity.fraction={fraction}"] if fraction != "100%" else []
                overrides += [f"accuracy.data={data}"] if data else []
                report = build(recipe, overrides, Path(work) / f"{fraction}-{number}", store)
                results[fraction][name] = summary(report)
                settings = {"recipe": report["recipe"], "device": report["device"]}
    return {"environment": describe(), **settings, "texts": dict(texts), "fractions": results}


def build(
    recipe: Path, overrides: Sequence[str], out: Path, store: Path | None, until: str = "evaluate"
) -> dict[str, Any]:
    """The report of one build up to a stage. Raises UserError where it fails other than by a gate."""
    command = [*COMMAND, "build", str(recipe), "--out", str(out), "--until", until]
    for override in overrides:
        command += ["--set", override]
    command += ["--store", str(store)] if store else []
    print(f"{' '.join(overrides)} ...", file=sys.stderr, flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, check=False)
    if done.returncode not in (0, GATE_FAILED):
        raise UserError(
            f"the build with {overrides} ended with status {done.returncode}: {last_line(done.stderr)}",
            "correct the recipe",
        )
    report: dict[str, Any] = read_json(out / "report" / "report.json")
    return report


def summary(report: Mapping[str, Any]) -> dict[str, Any]:
    """Of a report's `accuracy`: what does not depend on how the engines were opened."""
    return {key: value for key, value in report["accuracy"].items() if key != "engines"}


def main() -> int:
    """Parses the command line, builds, writes the result and prints a line for each build."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning.fractions", description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--model", required=True, help="name of the model in the result")
    parser.add_argument("--fraction", action="append", required=True, help="share of the weights to make 2:4")
    parser.add_argument("--text", action="append", default=[], help="NAME=FILE: evaluate on this text as well")
    parser.add_argument("--store", type=Path, help="reuse stage outputs in this directory")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the result file")
    chosen = parser.parse_args()
    texts = dict(text.split("=", 1) for text in chosen.text)
    try:
        results = run(chosen.recipe, chosen.fraction, texts, chosen.store)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines(results["fractions"])))
    print(write_result(f"fractions-{chosen.model.lower()}", {"model": chosen.model, **results}, chosen.out))
    return 0


def lines(fractions: Mapping[str, Any]) -> list[str]:
    """One for each fraction and text."""
    return [
        f"{fraction} of the weights 2:4, {text}: perplexity {measured['dense']['perplexity']:.2f} -> "
        f"{measured['built']['perplexity']:.2f} ({measured['perplexity_increase']:+.1%})"
        for fraction, by_text in fractions.items()
        for text, measured in by_text.items()
    ]


if __name__ == "__main__":
    sys.exit(main())
