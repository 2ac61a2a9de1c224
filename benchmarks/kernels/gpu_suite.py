"""All checks and measurements that need a GPU, in one command:

    python -m benchmarks.kernels.gpu_suite --smoke   at most 150 s: versions, build, one product per kernel, a table
    python -m benchmarks.kernels.gpu_suite           at most 500 s: kernel tables, torch engine, tests, sanitizer

Each step is its own process with a time limit; a crash does not end other steps. The result file in `--out` is
rewritten after each step, and each step updates its own part while it runs: however this command ends, the results so
far and the reason are on disk. Requires torch, transformers, pytest and nvcc; imports no torch.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import environment
from plugins.common.errors import UserError
from plugins.common.json_files import read_json, write_json
from plugins.common.nvidia_smi import gpus

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results"
SMOKE_SECONDS, FULL_SECONDS = 150.0, 500.0
LEAST = 8.0  # seconds: with less left, no step is started
CUDA_LOST = 3  # exit status of tests/gpu after a CUDA error that the process cannot clear
GRACE = 5.0  # seconds between a step's own time limit and its end by force


@dataclass(frozen=True)
class Step:
    """Arguments of Python, in which {out} is the step's result file and {seconds} its limit."""

    name: str
    arguments: tuple[str, ...]
    seconds: float
    resumes: bool = False  # skips what its own result file holds already


def _table(model: str, formats: str, tokens: str, seconds: float) -> Step:
    options = ("--model", model, "--dtype", formats, "--tokens", tokens, "--seconds", "{seconds}", "--out", "{out}")
    return Step(f"table {model} {formats}", ("-m", "benchmarks.kernels.gemm", *options), seconds)


def _layer_times(name: str, module: str, seconds: float) -> Step:
    options = ("--tokens", "1,8,64", "--seconds", "{seconds}", "--out", "{out}")
    return Step(name, ("-m", f"benchmarks.kernels.{module}", *options), seconds)


def _tests(name: str, seconds: float, *options: str) -> Step:
    command = ("-m", "pytest", "tests/gpu", "-p", "no:cacheprovider", "--outcomes", "{out}")
    return Step(name, (*command, *options), seconds, resumes=True)


MACHINE = Step("machine", ("-m", "benchmarks.kernels.gpu_machine", "--out", "{out}"), 30)
BUILD = Step("build", ("-m", "plugins.libtwofour.compiler", "--out", "{out}"), 60)
SANITIZER = Step("sanitizer", ("-m", "benchmarks.kernels.sanitizer", "--seconds", "{seconds}", "--out", "{out}"), 30)
SMOKE = (
    BUILD,
    MACHINE,
    _tests("products", 45, "-k", "test_product"),
    _table("llama-3.1-8b", "fp8", "1,16,1024", 60),
)
FULL = (
    BUILD,
    MACHINE,
    _tests("products", 30, "-k", "test_product"),
    _table("llama-3.1-8b", "fp8", "1,8,16,64,512,1024,4096", 70),
    Step("engine", ("-m", "builder.engines.torch_backend.benchmark", "--seconds", "{seconds}", "--out", "{out}"), 150),
    _layer_times("hybrid layers", "hybrid_times", 40),
    _layer_times("patterns of 8", "pattern_times", 40),
    _table("llama-3.1-70b", "fp8", "1,16,1024,4096", 50),
    _table("llama-3.1-8b", "int8,bf16", "1,16,1024,4096", 60),
    _table("llama-3.1-70b", "int8", "1,16,1024", 40),
    _tests("tests", 60, "-k", "not test_product"),
    SANITIZER,
)


def run(steps: Iterable[Step], seconds: float, file: Path) -> dict[str, Any]:
    """Runs the steps in turn within `seconds`, writing `file` after each; returns its content."""
    end = time.monotonic() + seconds
    results: dict[str, Any] = {"kind": "gpu", "environment": environment.describe(), "steps": {}}
    for step in steps:
        print(f"== {step.name}", flush=True)
        results["steps"][step.name] = run_step(step, end - time.monotonic(), file.parent)
        results["seconds"] = round(seconds - (end - time.monotonic()), 1)
        save(file, results, step.name)
    return results


def save(file: Path, results: dict[str, Any], name: str) -> None:
    """Writes the results file; where that fails (a full disk), prints the step's part, and the next steps still run."""
    try:
        write_json(file, results)
    except OSError as error:
        print(
            f"cannot write '{file}' ({error}); the result of {name}: {json.dumps(results['steps'][name])}", flush=True
        )


def run_step(step: Step, left: float, directory: Path) -> dict[str, Any]:
    """One step as a child process: what it wrote, its seconds, and an `error` where it did not end well."""
    limit = min(step.seconds, left - GRACE)
    if limit < LEAST:
        return {"error": f"not run: {max(left, 0):.0f} s are left"}
    part = directory / f"{re.sub(r'[^a-z0-9]+', '-', step.name)}.part.json"
    part.unlink(missing_ok=True)
    values = {"{out}": str(part), "{seconds}": f"{limit:.0f}"}
    arguments = [values.get(argument, argument) for argument in step.arguments]
    begin, size = time.monotonic(), -1
    while True:
        outcome = run_child([sys.executable, *arguments], begin + limit + GRACE - time.monotonic())
        previous, size = size, part.stat().st_size if part.exists() else 0
        if not (step.resumes and outcome.crashed and size > previous and time.monotonic() < begin + limit - LEAST):
            break
    result: dict[str, Any] = {"seconds": round(time.monotonic() - begin, 1)}
    if outcome.error is not None:
        print(f"{step.name}: {outcome.error}", flush=True)
        result["error"] = outcome.error
    if part.exists():
        result["result"] = read_json(part)
        part.unlink()
    return result


@dataclass(frozen=True)
class Outcome:
    """How a child ended: why it failed, in one line, and whether it ended before its work did."""

    error: str | None = None
    crashed: bool = False


def run_child(command: Sequence[str], seconds: float) -> Outcome:
    """Runs a command, passing its output on as it comes; after `seconds` ends it and all that it started."""
    options: dict[str, Any] = {"cwd": ROOT, "env": {**os.environ, "PYTHONUNBUFFERED": "1"}, "start_new_session": True}
    try:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
    except OSError as error:
        return Outcome(f"{command[0]}: {error}")
    timer = threading.Timer(seconds, os.killpg, (child.pid, signal.SIGKILL))
    timer.start()
    last = ""
    assert child.stdout is not None
    for line in child.stdout:
        text = line.decode(errors="replace")
        print(text, end="", flush=True)
        last = text.strip() or last
    status = child.wait()
    expired = not timer.is_alive()
    timer.cancel()
    if status == 0:
        return Outcome()
    if expired:
        return Outcome(f"stopped after {seconds:.0f} s")
    return Outcome(f"exit status {status}: {last}", crashed=status == CUDA_LOST or status < 0)


def results_file(directory: Path, gpu: str, kind: str = "gpu") -> Path:
    """KIND-NAME-DATE.json in `directory`."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia ")).strip("-")
    return directory / f"{kind}-{name}-{datetime.datetime.now(datetime.UTC):%Y-%m-%d-%H%M}.json"


def failures(results: dict[str, Any]) -> list[str]:
    """The steps that did not end well, and the tests that failed."""
    failed = []
    for name, step in results["steps"].items():
        if "error" in step:
            failed.append(f"{name}: {step['error']}")
        elif name in ("products", "tests"):
            failed += [f"{test}: {why}" for test, why in step["result"].items() if why not in ("passed", "skipped")]
    return failed


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="run the short form")
    parser.add_argument("--seconds", type=float, help="end after this many seconds")
    parser.add_argument("--out", type=Path, default=RESULTS, help="directory of the result file")
    chosen = parser.parse_args(arguments)
    seconds = chosen.seconds or (SMOKE_SECONDS if chosen.smoke else FULL_SECONDS)
    try:
        names = [gpu.name for gpu in gpus()]
        if not names:
            raise UserError("nvidia-smi shows no GPU: run this on a machine with one")
        chosen.out.mkdir(parents=True, exist_ok=True)
        file = results_file(chosen.out, names[0])
        results = run(SMOKE if chosen.smoke else FULL, seconds, file)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    failed = failures(results)
    print("\n".join([f"wrote {file}", *failed]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
