"""Kills builds with SIGKILL at random moments and runs each again; prints, as JSON, what that left.

    python kill_builds.py RECIPE PRESET FOLDER KILLS

Run on its own: every build is a fork of this process, which has imported torch and ModelOpt and runs no threads, so
that a build takes its own time and not python's.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import modelopt.torch.export
import modelopt.torch.quantization  # noqa: F401  (warm, for the forks)
import torch
import transformers.models.llama.modeling_llama  # noqa: F401
from command import twofour

from builder.artifacts.filesystem import sha256_tree


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


def kill_at(moment: float, arguments: list[str], store: Path) -> dict[str, list[str]] | None:
    """Kills a build `moment` seconds after its start. Returns what its store holds then; None where it had ended."""
    pid = start(arguments)
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)  # of one that ended it finds the process not yet waited for
    if ended(pid) != -signal.SIGKILL:
        return None
    return {
        "finished": sorted(path.parent.name for path in store.glob("entries/*/*")),
        "begun": sorted(path.name for path in store.glob("work/*/**/*") if path.is_file()),
    }


def main(recipe: str, preset: str, folder: Path, kills: int) -> None:
    torch.set_num_threads(1)

    def arguments(number: int) -> list[str]:
        out, store = folder / f"out{number}", folder / f"store{number}"
        return ["build", recipe, "--preset", preset, "--until", "checkpoint", "--out", str(out), "--store", str(store)]

    began = time.monotonic()
    status = ended(start(arguments(0)))
    seconds = time.monotonic() - began
    actual = {"undisturbed": _tree(folder / "out0"), "status": status, "seconds": seconds, "kills": []}
    random.seed(24)
    for number in range(1, kills + 1):
        out = folder / f"out{number}"
        moment = (number - random.random()) / kills * seconds  # one in each tenth of a build
        while not (killed := kill_at(moment, arguments(number), folder / f"store{number}")):
            moment /= 2  # the build was faster this time
            shutil.rmtree(out)
            shutil.rmtree(folder / f"store{number}")
        half = out.exists() and not (out / "manifest.json").exists()
        status = ended(start(arguments(number)))
        actual["kills"].append({**killed, "half": half, "status": status, "tree": _tree(out)})
    print(json.dumps(actual))


def _tree(out: Path) -> dict[str, str]:
    return sha256_tree(out / "checkpoint") if (out / "checkpoint").is_dir() else {}


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
