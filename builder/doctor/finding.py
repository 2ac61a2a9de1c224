"""A finding of `twofour doctor`, and child processes that cannot hang it."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "broken", "unfit"]  # unfit: present, in a version that does not work here


@dataclass(frozen=True)
class Finding:
    """The state of one thing. `message` is one line; `fix` is the next step if the state is not "ok"."""

    name: str
    state: State
    version: str | None = None
    message: str = ""
    fix: str = ""

    @property
    def ok(self) -> bool:
        return self.state == "ok"


def run_child(
    command: Sequence[str], seconds: float, environment: dict[str, str] | None = None
) -> tuple[int | None, str]:
    """(exit status, output, or stderr after a failure); no status after a timeout."""
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return 127, str(error)
    with child:
        try:
            out, err = child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # the whole group: its children may hold the pipes open
            return None, ""
    return child.returncode, (out if child.returncode == 0 else err).strip()
