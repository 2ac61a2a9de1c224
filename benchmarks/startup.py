"""Times the start of the command line: `python -m benchmarks.startup`.

Compares `twofour --help` and `twofour plan` with `python -c pass`, in rounds that run each command once, so that ratios
are paired. Writes `results/startup.json` with every run, the machine and the versions.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import environment
from benchmarks.serving import stats
from plugins.common.json_files import write_json

RESULTS = Path(__file__).parent / "results"
BASELINE = "python -c pass"
PRESET = "fp8-2of4"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="examples/docs-llama", help="model for `twofour plan`")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS / "startup.json")
    options = parser.parse_args(arguments)
    twofour = Path(sys.executable).with_name("twofour")  # the console script of this very environment
    if not twofour.exists():
        parser.error(f"no '{twofour}': install the project first, with pip install -e .")
    commands = {
        BASELINE: [sys.executable, "-c", "pass"],
        "twofour --help": [str(twofour), "--help"],
        f"twofour plan {options.model} --preset {PRESET}": [str(twofour), "plan", options.model, "--preset", PRESET],
    }
    result = measure(commands, options.rounds)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, result)
    for name, row in result["commands"].items():
        low, high = row["interval"] or (row["ratio"], row["ratio"])
        ratio = f"{row['ratio']:5.2f}x [{low:.2f}, {high:.2f}]"
        print(f"{row['median_ms']:7.1f} ms  {ratio}  {row['modules']:4d} modules  {name}")
    print(f"written to {options.out}")


def measure(commands: dict[str, list[str]], rounds: int) -> dict[str, Any]:
    """Milliseconds of every run, the median, its paired ratio to the first command with an interval, and the modules.

    The first command is the baseline. A first round, not counted, fills the caches. Raises CalledProcessError where a
    command fails.
    """
    for command in commands.values():
        _run(command)
    runs: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds):
        for name in sorted(commands, reverse=number % 2 == 1):
            runs[name].append(_run(commands[name]))
    cluster = np.arange(rounds)
    base = stats.percentile(np.array(next(iter(runs.values()))), cluster, 50)
    rows = {}
    for name, command in commands.items():
        median = stats.percentile(np.array(runs[name]), cluster, 50)
        ratio = stats.estimate(stats.ratio(median, base), rounds)
        rows[name] = {
            "median_ms": float(np.median(runs[name])),
            "ratio": ratio.value,
            "interval": ratio.interval,
            "modules": len(modules(command)),
            "runs_ms": runs[name],
        }
    return {"baseline": next(iter(commands)), "rounds": rounds, "commands": rows, "environment": environment.describe()}


def modules(command: Sequence[str]) -> list[str]:
    """The modules that a Python command imports, as the interpreter itself reports them."""
    profile = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
    profile_text = subprocess.run(command, env=profile, capture_output=True, check=True, text=True).stderr
    return [line.rsplit("|", 1)[1].strip() for line in profile_text.splitlines() if line.startswith("import time:")][1:]


def _run(command: Sequence[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    main()
