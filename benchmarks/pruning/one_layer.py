"""python -m benchmarks.pruning.one_layer: seconds and error of 2:4 solvers, ours and others', on one Hessian.

Each runs in its own process, llm-compressor in its own environment (see `benchmarks.pruning.accuracy`). The rate counts
the products that SparseGPT requires: N K^2 for the weight's updates and 2/3 K^3 for factoring and inverting the
Hessian. Its limit is a float32 product of this machine, measured in the same process.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from benchmarks.pruning.accuracy import LLMCOMPRESSOR, RESULTS, environment_python, run_script, write_result
from plugins.common.errors import UserError
from plugins.common.json_files import read_json

SOLVERS = ("twofour sparsegpt", "twofour reconstruct", "modelopt sparsegpt", "llm-compressor sparsegpt")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All solvers, one after the other."""
    results: dict[str, Any] = {}
    for solver in SOLVERS:
        print(f"{solver} ...", file=sys.stderr, flush=True)
        python = environment_python(arguments.environment, LLMCOMPRESSOR) if "llm" in solver else sys.executable
        with tempfile.NamedTemporaryFile(suffix=".json") as out:
            size = (str(arguments.out_features), str(arguments.in_features))
            run_script(python, "prune_layer", solver, *size, out.name)
            results[solver] = read_json(Path(out.name))
        operations = arguments.out_features * arguments.in_features**2 + arguments.in_features**3 * 2 / 3
        results[solver]["rate"] = operations / results[solver]["seconds"]
        results[solver]["share_of_peak"] = results[solver]["rate"] / results[solver]["peak"]
    settings = {"out_features": arguments.out_features, "in_features": arguments.in_features}
    ours = results["twofour sparsegpt"]["seconds"]
    times = {solver: row["seconds"] / ours for solver, row in results.items() if solver != "twofour sparsegpt"}
    return {"environment": describe(), "settings": settings, "solvers": results, "seconds_over_ours": times}


def main() -> None:
    """Parses the command line, runs, prints the table and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning.one_layer", description=__doc__)
    parser.add_argument("--out-features", type=int, default=4096)
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--environment", type=Path, default=Path("build/peers/llmcompressor"))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    try:
        results = run(arguments)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{'solver':26}{'seconds':>9}{'error':>9}{'GFLOP/s':>9}{'of peak':>9}  2:4")
    for solver, row in results["solvers"].items():
        measured = f"{row['seconds']:9.2f}{row['error']:9.4f}{row['rate'] / 1e9:9.0f}{row['share_of_peak']:9.0%}"
        print(f"{solver:26}{measured}  {'yes' if row['holds_2of4'] else 'no'}")
    print(write_result("pruning_layer", results, arguments.out))


if __name__ == "__main__":
    main()
