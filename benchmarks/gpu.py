"""All checks and measurements that need a GPU, in one command of under nine minutes:

    python -m benchmarks.gpu

builds libtwofour for the GPU here, runs the test functions of tests/gpu (they need no pytest), the kernel tables of
Llama-3.1-8B and 70B, the torch engine dense against 2:4 on a Llama-3.1-8B of random weights, and compute-sanitizer
where it is installed. Each step is a process of its own: one that crashes takes no other with it. Leaves one JSON in
results/, also where a step failed or time ran out, and says which. Needs torch, transformers and nvcc alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import replace_json
from plugins import build
from plugins.errors import UserError

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests" / "gpu"
BUDGET = 510.0  # seconds, without what torch's import takes
LEAST = 10.0  # seconds: with less left, nothing is started
TABLES = (  # model, formats, tokens, share of the tables' time
    ("llama-3.1-8b", ("fp8", "int8", "bf16"), (1, 8, 16, 64, 512, 1024, 4096), 0.6),
    ("llama-3.1-70b", ("fp8", "int8", "bf16"), (1, 16, 1024, 4096), 0.4),
)
SANITIZED = ("test_token_counts_on_and_off_alignment", "test_every_split_gives_the_same_integers")
SANITIZER = 60.0  # seconds kept for it
POISONED = 3  # exit status of a test process whose CUDA context an error has spoilt


def run(seconds: float, report: Callable[[str], None] = print) -> dict[str, Any]:
    """All steps within `seconds`; the content of the results file."""
    end = time.monotonic() + seconds

    def left() -> float:
        return end - time.monotonic()

    results: dict[str, Any] = {"build": step("build", _build, report)}
    if "error" not in results["build"]:
        results["tests"] = step("tests", lambda: _tests(0.25 * left(), report), report)
        results["tables"] = step("tables", lambda: _tables(0.6 * left(), left, report), report)
        results["engine"] = step("engine", lambda: _engine(max(left() - SANITIZER, 0.7 * left()), left, report), report)
        results["sanitizer"] = step("sanitizer", lambda: _sanitizer(left()), report)
    results["seconds"] = round(seconds - left(), 1)
    return results


def step(name: str, work: Callable[[], Any], report: Callable[[str], None]) -> dict[str, Any]:
    """Runs one step; an error becomes its result, so that the rest still runs."""
    report(f"== {name}")
    begin = time.monotonic()
    try:
        outcome = {"result": work()}
    except (UserError, RuntimeError, OSError, subprocess.SubprocessError, ValueError) as error:
        outcome = {"error": f"{type(error).__name__}: {error}"}
        report(outcome["error"])
    return {**outcome, "seconds": round(time.monotonic() - begin, 1)}


def _build() -> dict[str, Any]:
    made = build.build()
    return {"library": made.library, "sms": list(made.sms), "nvcc": made.nvcc}


def _tests(seconds: float, report: Callable[[str], None]) -> dict[str, str]:
    """Outcome of every test function of tests/gpu by name: "passed", or why not."""
    outcomes: dict[str, str] = {}
    waiting = test_names()
    deadline = time.monotonic() + seconds
    crashes = 0  # one after the other: then it is not one test's fault
    while waiting and crashes < 2 and time.monotonic() < deadline:
        done = _child(["benchmarks.gpu", "--step", "tests", "--only", ",".join(waiting)], deadline - time.monotonic())
        outcomes |= done["content"]
        crashes = 0 if done["content"] else crashes + 1
        if done["status"] not in (0, POISONED) and waiting[0] not in outcomes:
            outcomes[waiting[0]] = f"crashed or ran out of time: {done['words']}"
        waiting = [name for name in waiting if name not in outcomes]
    outcomes |= dict.fromkeys(waiting, "not run: out of time" if crashes < 2 else "not run: two before it crashed")
    for name, outcome in outcomes.items():
        report(f"{name}: {outcome}")
    return outcomes


def _tables(seconds: float, left: Callable[[], float], report: Callable[[str], None]) -> dict[str, Any]:
    """The rows of every table, and the last words of those that did not end well."""
    rows: list[dict[str, Any]] = []
    broken: dict[str, str] = {}
    for model, formats, tokens, share in TABLES:
        for format in formats:
            budget = seconds * share / len(formats)
            options = ["--step", "table", "--model", model, "--dtype", format, "--tokens", ",".join(map(str, tokens))]
            done = _child(["benchmarks.gpu", *options, "--seconds", str(budget)], min(budget + 60, left()))
            rows += done["content"].get("rows", [])
            if done["status"] != 0:
                broken[f"{model} {format}"] = done["error"]
            report(done["words"])
    return {"rows": rows, "broken": broken}


def _engine(seconds: float, left: Callable[[], float], report: Callable[[str], None]) -> dict[str, Any]:
    """The torch engine's own measurement, as a command: nothing of benchmarks/ imports builder/."""
    done = _child(["builder.engines.torch.speed", "--seconds", str(seconds)], min(max(30.0, seconds + 30), left()))
    report(done["words"])
    if done["status"] != 0:
        if not done["content"]:
            raise RuntimeError(done["error"])
        report(done["error"])
        return {**done["content"], "broken": done["error"]}
    content: dict[str, Any] = done["content"]
    return content


def _sanitizer(seconds: float) -> dict[str, str]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"memcheck": "not run: compute-sanitizer is not installed"}
    if seconds < 30:
        return {"memcheck": "not run: out of time"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu"]
    with tempfile.TemporaryDirectory() as directory:
        options = ["--step", "tests", "--only", ",".join(SANITIZED), "--out", f"{directory}/out.json"]
        try:
            done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"memcheck": f"stopped after {seconds:.0f} s without a finding"}
    return {"memcheck": "clean" if done.returncode == 0 else _last_line(done.stdout)}


def _child(command: Sequence[str], seconds: float) -> dict[str, Any]:
    """A module run in a process of its own: exit status, what it left in --out, what it said, and its last words."""
    if seconds < LEAST:
        return {"status": -1, "content": {}, "words": "not run: out of time", "error": "not run: out of time"}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "out.json"
        whole = [sys.executable, "-m", *command, "--out", str(file)]
        try:
            done = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
            status, words = done.returncode, done.stdout.strip() or _last_line(done.stderr)
            error = _last_line(done.stderr) or f"exit status {status}"
        except subprocess.TimeoutExpired as stopped:
            said = stopped.stdout.decode(errors="replace") if isinstance(stopped.stdout, bytes) else ""
            status, words = -1, f"{said}stopped after {seconds:.0f} s"
            error = _last_line(words)
        content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return {"status": status, "content": content, "words": words, "error": error}


def test_names() -> list[str]:
    """The test functions of tests/gpu, by their text: nothing is imported here."""
    lines = [line for file in sorted(TESTS.glob("test_*.py")) for line in file.read_text().splitlines()]
    return [line[4 : line.index("(")] for line in lines if line.startswith("def test_")]


def run_tests(names: Sequence[str], out: Path) -> int:
    """Calls test functions, writing their outcomes as they come. POISONED where CUDA cannot go on after a failure."""
    import torch

    functions: dict[str, Callable[[], None]] = {}
    for file in sorted(TESTS.glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        functions |= {name: value for name, value in vars(module).items() if name.startswith("test_")}
    outcomes: dict[str, str] = {}
    for name in names:
        try:
            functions[name]()
            torch.cuda.synchronize()
            outcomes[name] = "passed"
        except Exception as error:  # whatever a test may raise is its outcome
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcomes[name] = f"failed: {type(error).__name__}: {_last_line(str(error))[:300]} (line {place.lineno})"
        replace_json(out, outcomes)
        if outcomes[name] != "passed" and not _alive():
            return POISONED
    return 0 if all(outcome == "passed" for outcome in outcomes.values()) else 1


def _alive() -> bool:
    """Whether CUDA still works in this process."""
    import torch

    try:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def run_table(chosen: argparse.Namespace) -> int:
    from benchmarks import gemm

    deadline = time.monotonic() + chosen.seconds
    tokens = [int(count) for count in chosen.tokens.split(",")]
    gemm.table(
        chosen.model,
        [chosen.dtype],
        tokens,
        peers=True,
        expired=lambda: time.monotonic() > deadline,
        keep=lambda rows: replace_json(Path(chosen.out), {"rows": rows}),
    )
    return 0


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""


def _require_gpu() -> None:
    import torch

    if not build.gpu_sms():
        raise UserError("nvidia-smi shows no GPU here: run this on a machine with one")
    if not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} sees no GPU here: install one that was built for CUDA")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=BUDGET)
    for name in ("--step", "--only", "--model", "--dtype", "--tokens", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)  # how this command calls itself
    chosen = parser.parse_args(arguments)
    try:
        if chosen.step == "tests":
            return run_tests(chosen.only.split(","), Path(chosen.out))
        if chosen.step == "table":
            return run_table(chosen)
        _require_gpu()
        results = run(chosen.seconds)
        from benchmarks import gemm

        print(gemm.save("gpu", results))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    tests = results.get("tests", {}).get("result", {})
    whole = all("error" not in part for part in results.values() if isinstance(part, dict))
    whole = whole and not any(results[name].get("result", {}).get("broken") for name in ("tables", "engine"))
    return 0 if whole and tests and all(outcome == "passed" for outcome in tests.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
