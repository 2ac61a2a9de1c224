"""Runs one process a rank, keeps each one's log, and where one dies ends the others and reports why it died, first."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from builder.engines.trtllm.build_errors import explain
from plugins.common.errors import UserError
from plugins.common.progress import Progress

_POLL = 0.05  # seconds
_PATIENCE = 10.0  # seconds between SIGTERM and SIGKILL of a rank
_LOG_SHOWN = 1 << 20  # bytes at the end of a log that are searched for the cause
_LOG_KEPT = 16 << 20  # bytes at the end of a failed rank's log that outlive the engine directory


def run_ranks(
    commands: Sequence[Sequence[str]],
    logs: Sequence[Path],
    environments: Sequence[dict[str, str]],
    doing: str,
    progress: Progress | None = None,
) -> None:
    """Runs `commands[r]` for every rank at once, its output into `logs[r]`, `environments[r]` over our own.

    Raises UserError as soon as one rank fails, with the rank and the cause from its log; the others are ended first.
    """
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for command, log, environment in zip(commands, logs, environments, strict=True):
            with log.open("wb") as file:
                processes.append(
                    subprocess.Popen(
                        list(command),
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        env={**os.environ, **environment},
                        start_new_session=True,  # child processes of a rank end with it
                    )
                )
        _wait(processes, logs, doing, progress)
    finally:
        _end(processes)


def _wait(
    processes: Sequence[subprocess.Popen[bytes]], logs: Sequence[Path], doing: str, progress: Progress | None
) -> None:
    reported = -1
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                raise UserError(_failure(doing, rank, code, logs[rank]))
        done = sum(code == 0 for code in codes)
        if progress and done != reported:
            reported = done
            progress(doing, done, len(processes))
        if done == len(processes):
            return
        time.sleep(_POLL)


def _failure(doing: str, rank: int, code: int, log: Path) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    output = _end_of(log, _LOG_SHOWN).decode("utf8", "replace")
    return f"{doing}: rank {rank} {how}, {explain(output)} (its log: '{_keep(log)}')"


def _keep(log: Path) -> Path:
    """A copy of the log's end: whoever builds removes the half-made engine directory, and the log with it."""
    kept = Path(tempfile.mkdtemp(prefix="twofour-failed-")) / log.name
    kept.write_bytes(_end_of(log, _LOG_KEPT))
    return kept


def _end_of(log: Path, count: int) -> bytes:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - count))
        return file.read()


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends every running rank and its child processes: SIGTERM, and SIGKILL after `_PATIENCE`."""
    for process in processes:
        _signal(process, signal.SIGTERM)
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # the whole group has ended
        os.killpg(process.pid, number)
