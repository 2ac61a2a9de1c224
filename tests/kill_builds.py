"""Kills builds with SIGKILL at random moments and runs each again; prints, as JSON, what that left.

    python kill_builds.py RECIPE PRESET FOLDER KILLS

Run on its own: every build is a fork of this process, which has imported torch and ModelOpt and runs no threads, so
that a build takes its own time and not python's.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import modelopt.torch.export
import modelopt.torch.quantization  # noqa: F401  (warm, for the forks)
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from command import twofour

from builder.files import sha256_tree


def start(arguments: list[str]) -> int:
    """A build in a process of its own. Returns its id."""
    pid = os.fork()
    if pid == 0:
        outcome = twofour(*arguments)
        sys.stderr.write(outcome.stderr if outcome.status else "")
        sys.stderr.flush()
        os._exit(outcome.status)
    return pid


def ended(pid: int) -> int:
    """The status of a build when it ends; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(recipe: str, preset: str, folder: Path, kills: int) -> None:
    torch.set_num_threads(1)

    def arguments(number: int) -> list[str]:
        out, store = folder / f"out{number}", folder / f"store{number}"
        return ["build", recipe, "--preset", preset, "--until", "checkpoint", "--out", str(out), "--store", str(store)]

    began = time.monotonic()
    status = ended(start(arguments(0)))
    seconds = time.monotonic() - began
    found = {"undisturbed": _tree(folder / "out0"), "status": status, "seconds": seconds, "kills": []}
    random.seed(24)
    for number in range(1, kills + 1):
        pid = start(arguments(number))
        time.sleep(random.uniform(0.02, 0.95) * seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        killed = ended(pid) == -signal.SIGKILL
        finished = sorted(path.parent.name for path in folder.glob(f"store{number}/entries/*/*"))
        half = (folder / f"out{number}").exists() and not (folder / f"out{number}" / "manifest.json").exists()
        again = ended(start(arguments(number)))
        tree = _tree(folder / f"out{number}")
        found["kills"].append({"killed": killed, "finished": finished, "half": half, "status": again, "tree": tree})
    print(json.dumps(found))


def _tree(out: Path) -> dict[str, str]:
    return sha256_tree(out / "checkpoint") if (out / "checkpoint").is_dir() else {}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
