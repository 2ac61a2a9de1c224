"""compute-sanitizer's memcheck over the skinny kernel's tests, where it is installed.

python -m benchmarks.kernels.sanitizer --seconds 30 --out memcheck.json
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from plugins.common.json_files import write_json

ROOT = Path(__file__).parents[2]
TESTS = "test_token_counts and skinny and fp8 or test_every_split"
FOUND = 9  # the tool's exit status on a finding


def memcheck(seconds: float) -> str:
    """ "clean", the last line of a finding, or why there is no answer."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return "not run: compute-sanitizer is not installed"
    tests = [sys.executable, "-m", "pytest", "tests/gpu", "-x", "-p", "no:cacheprovider", "-k", TESTS]
    try:
        done = subprocess.run(
            [tool, "--tool", "memcheck", "--error-exitcode", str(FOUND), *tests],
            cwd=ROOT, capture_output=True, text=True, errors="replace", timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s without a finding"
    if done.returncode == 0:
        return "clean"
    return next((line for line in reversed(done.stdout.splitlines()) if line.strip()), f"status {done.returncode}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--out", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    outcome = memcheck(chosen.seconds)
    write_json(chosen.out, {"memcheck": outcome})
    print(f"memcheck: {outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
