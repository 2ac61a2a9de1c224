"""Accuracy and speed of SmolLM2-135M-Instruct on this machine: INT8 dense, and with 2:4 or 4:8 in shares of weights.

    python examples/smollm2/make_model.py build/smollm2
    python -m benchmarks.pruning.smollm2 [--store build/store]

Builds examples/smollm2/recipe.yaml with each variant up to its benchmark, compares it with the dense bfloat16 model and
with the first variant's build (INT8 alone: what sparsity adds), and evaluates each build again on text of a kind that
the calibration text lacks. Run it on an idle machine. It writes
to `benchmarks/results/`; `make docs` copies the result into README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from benchmarks.pruning.accuracy import RESULTS, last_line, write_result
from benchmarks.pruning.fractions import COMMAND, build, summary
from plugins.common.errors import UserError

RECIPE = Path("examples/smollm2/recipe.yaml")
OTHER = Path("build/smollm2/other.jsonl")
OTHER_WINDOWS = 200
VARIANTS = {
    "INT8": ["sparsity=null"],
    "INT8, 2:4 in a quarter": ["sparsity.fraction=25%"],
    "INT8, 4:8 in a quarter": ["sparsity.pattern=4:8", "sparsity.fraction=25%"],
    "INT8, 4:8 in a half": ["sparsity.pattern=4:8", "sparsity.fraction=50%"],
    "INT8, 2:4 in all": ["sparsity.fraction=null"],
}
WORKLOADS = (
    "{input_tokens: 128, output_tokens: 32, concurrency: [1, 4], requests: 4}",
    "{input_tokens: 128, output_tokens: 32, concurrency: [16], requests: 16}",
    "{input_tokens: 512, output_tokens: 8, concurrency: [1], requests: 4}",
)
BENCH = ("--input-tokens", "128", "--output-tokens", "32", "--concurrency", "1,4", "--requests", "4", "--rounds", "8")
METRICS = ("output_token_throughput", "time_to_first_token", "inter_token_latency")


def run(chosen: Sequence[str], store: Path | None) -> dict[str, Any]:
    """Accuracy on both texts, size and speed of each variant, the speed also against the first variant's.

    Raises UserError where a build fails.
    """
    variants: dict[str, Any] = {}
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="twofour-smollm2-") as work:
        for number, (name, overrides) in enumerate((name, VARIANTS[name]) for name in chosen):
            overrides = [*overrides, f"benchmark.workloads=[{', '.join(WORKLOADS)}]"]
            out, first = Path(work) / f"{number}", Path(work) / "0"
            report = build(RECIPE, overrides, out, store, until="benchmark")
            other = build(
                RECIPE,
                [*overrides, f"accuracy.data={OTHER}", f"accuracy.samples={OTHER_WINDOWS}"],
                Path(work) / f"{number}-other",
                store,
            )
            variants[name] = {
                "accuracy": summary(report),
                "other_text": summary(other),
                "size": report["size"],
                "performance": [_point(point) for point in report["performance"]],
                "over_first": [_point(point) for point in bench(out, first)] if number else [],
                "gates": report["gates"],
            }
            facts = facts or {"model": report["model"], "recipe": report["recipe"], "device": report["device"]}
    return {"environment": describe(), **facts, "variants": variants}


def bench(out: Path, baseline: Path) -> list[dict[str, Any]]:
    """The speed of a build against another one, in interleaved rounds. Raises UserError where it cannot be measured."""
    command = [*COMMAND, "bench", str(out), "--baseline", str(baseline), *BENCH, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"'{out}' cannot be compared with '{baseline}': {last_line(done.stderr)}")
    points: list[dict[str, Any]] = json.loads(done.stdout)
    return points


def _point(point: dict[str, Any]) -> dict[str, Any]:
    """Means, ratios and their intervals of one workload."""
    sides = {side: {name: point[side][name] for name in METRICS} for side in ("dense", "built", "speedup")}
    return {"workload": point["workload"], "concurrency": point["concurrency"], "rounds": point["rounds"], **sides}


def main() -> int:
    """Parses the command line, builds and writes the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning.smollm2", description=__doc__)
    parser.add_argument("--variant", action="append", choices=tuple(VARIANTS), help="build this variant; default: all")
    parser.add_argument("--store", type=Path, help="reuse stage outputs in this directory")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the result file")
    chosen = parser.parse_args()
    try:
        result = run(chosen.variant or tuple(VARIANTS), chosen.store)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(write_result("smollm2", result, chosen.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
