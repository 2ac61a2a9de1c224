"""python -m benchmarks.pruning.rivals: the cost of 2:4 in part and of other ways to the same time, on one model.

Decoding is bound by the bytes of the weights, so rows of equal predicted time save equal shares of the blocks' bytes:
2:4 or 4:8 in the share F of the weights saves 0.375 F of them at 8 bit. Rows of a share are builds with
`sparsity.fraction`; whole layers are selected by the same prices, as for TensorRT-LLM's backends. All are pruned
without quantization, by SparseGPT in one pass if a solver is needed, on the same tokens, and evaluated on held-out
text. The n:8 patterns save bytes and no multiplications. Unstructured sparsity has no kernel here: its row gives
accuracy only. With --peers, llm-compressor runs in a separate environment.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import describe
from benchmarks.pruning import accuracy
from benchmarks.pruning.accuracy import LLMCOMPRESSOR, environment_python, judge, last_line, linear_layers, make_tokens
from benchmarks.pruning.fractions import COMMAND
from plugins.common.errors import UserError
from plugins.common.patterns import OF_EIGHT, bytes_per_weight

FRACTIONS = (0.25, 0.5)
OTHERS = (*OF_EIGHT, "25%")
UNITS = {"torch": "coupled channels", "pytorch": "whole layers"}  # that a backend's fraction selects


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Every row: bytes saved, where a kernel saves them, and accuracy. Raises UserError where one cannot be made."""
    layers, tokens = linear_layers(arguments.model), make_tokens(arguments, work)
    rows: dict[str, dict[str, Any]] = {"dense": {"bytes_saved": 0.0}}
    directories, numbers = {"dense": str(arguments.model)}, itertools.count()

    def add(name: str, directory: Path, saved: float | None) -> None:
        """Skips a name that is listed already: rounding to whole blocks maps two shares to one row."""
        directories[name], rows[name] = str(directory), {"bytes_saved": saved}

    def prune(name: str, script: str, method: str, python: str = sys.executable) -> tuple[Path, Any]:
        print(f"{name} ...", file=sys.stderr, flush=True)
        out = work / f"{next(numbers)}"
        return out, accuracy.prune(python, script, method, arguments.model, tokens, layers, out)

    for fraction in FRACTIONS:
        for pattern, backend in (("2:4", "torch"), ("4:8", "torch"), ("2:4", "pytorch")):
            out = build(arguments, work, fraction, pattern, backend, work / f"{next(numbers)}")
            add(f"{pattern} in {fraction:.0%}, {UNITS[backend]}", out, saved_by(pattern) * fraction)
        for kind in ("blocks", "channels"):
            out, facts = prune(f"{kind} at {fraction:.0%}", "prune_rival", f"{kind} {saved_by('2:4') * fraction}")
            add(f"{facts['left_out']:.1%} of the blocks' weights: {kind} dropped", out, facts["left_out"])
    for pattern in OTHERS:
        out, _ = prune(pattern, "prune_rival", pattern)
        if ":" in pattern:
            add(f"{pattern} in all layers", out, saved_by(pattern))
        else:
            add(f"{pattern} unstructured", out, None)
    out, _ = prune("2:4", "prune_twofour", "sparsegpt")
    add("2:4 in all layers", out, saved_by("2:4"))
    if arguments.peers:
        python = environment_python(arguments.environment, LLMCOMPRESSOR)
        out, _ = prune("llm-compressor", "prune_llmcompressor", "sparsegpt", python)
        add("2:4 in all layers, llm-compressor", out, saved_by("2:4"))
    for name, judged in judge(arguments, layers, directories).items():
        rows[name] |= judged
    names = ("model", "calibration", "evaluation", "every", "samples")
    settings = {name: str(getattr(arguments, name)) for name in names}
    return {"environment": describe(), "settings": settings, "rows": rows}


def saved_by(pattern: str) -> float:
    """The share of a weight's bytes at 8 bit."""
    return 1 - bytes_per_weight(pattern, 1)


def build(arguments: argparse.Namespace, work: Path, fraction: float, pattern: str, backend: str, out: Path) -> Path:
    """The checkpoint of a build with the pattern in `fraction` of the weights. Raises UserError where it fails."""
    settings = {
        "engine.backend": backend,
        "sparsity.pattern": pattern,
        "sparsity.method": "sparsegpt",
        "sparsity.fraction": fraction,
        "calibration.data": arguments.calibration,
        "calibration.samples": arguments.samples,
        "calibration.sequence_length": arguments.sequence_length,
        "calibration.seed": arguments.seed,
    }
    command = [*COMMAND, "build", str(arguments.model), "--preset", "2of4-all", "--until", "checkpoint"]
    command += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    print(f"{pattern} in {fraction:.0%} on {backend} ...", file=sys.stderr, flush=True)
    done = subprocess.run(
        [*command, "--out", str(out), "--store", str(work / "store")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"the build ended with status {done.returncode}: {last_line(done.stderr)}")
    return out / "checkpoint"


def _table(rows: dict[str, Any]) -> str:
    lines = [f"{'':52}{'bytes saved':>12}{'perplexity':>12}{'increase':>10}{'95% interval':>20}{'KL':>8}"]
    for name, row in rows.items():
        saved = "-" if row["bytes_saved"] is None else f"{row['bytes_saved']:.1%}"
        low, high = row["perplexity_increase_interval"]
        judged = f"{row['built']['perplexity']:12.2f}{row['perplexity_increase']:10.1%}"
        lines.append(f"{name:52}{saved:>12}{judged}{f'{low:.1%} to {high:.1%}':>20}{row['kl']:8.4f}")
    return "\n".join(lines)


def main() -> None:
    """Parses the command line, runs, prints the table and writes the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pruning.rivals", description=__doc__)
    accuracy.add_arguments(parser)
    parser.add_argument("--peers", action="store_true", help="run llm-compressor too")
    parser.add_argument("--environment", type=Path, default=Path("build/peers/llmcompressor"))
    arguments = parser.parse_args()
    results = accuracy.run_in_scratch(run, arguments)
    print(_table(results["rows"]))
    print(accuracy.write_result("rivals", results, arguments.out))


if __name__ == "__main__":
    main()
