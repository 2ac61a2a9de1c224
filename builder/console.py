"""The output of a running build: a progress bar on a terminal, plain lines elsewhere; all on stderr."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PACKAGES = ("builder", "calibration", "benchmarks", "plugins")
QUIET_SECONDS = 10.0  # between plain lines of one stage


class Console:
    """Shows the current stage, its progress, the time left, and warnings. `close` restores the terminal.

    It keeps its initial standard error, because that of libraries is redirected.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.stream = sys.stderr
        self.terminal = Terminal(file=self.stream, highlight=False, soft_wrap=True)
        self._handler = _Warnings(self)
        self._bar: Progress | None = None
        self._last = time.monotonic()
        self._step, self._began, self._first = "", 0.0, 0  # what is counted now, and its first report: when, steps done

    def __enter__(self) -> Console:
        for package in PACKAGES:
            logging.getLogger(package).addHandler(self._handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for package in PACKAGES:
            logging.getLogger(package).removeHandler(self._handler)
        self.close()

    def warn(self, message: object) -> None:
        """One line that begins with `warning:`, also where nothing else is printed."""
        (self._bar.console if self._bar else self.terminal).print(f"warning: {message}", markup=False)

    def print(self, line: str) -> None:
        """One plain line."""
        if not self.quiet:
            (self._bar.console if self._bar else self.terminal).print(line, markup=False)

    def progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total` steps of `what`. Fits every part's `progress` argument."""
        if self.quiet:
            return
        now = time.monotonic()
        if what != self._step:
            self._step, self._began, self._first = what, now, done
            self.close()
        if self.terminal.is_terminal:
            self._show(what, done, total)
        elif now - self._last > QUIET_SECONDS:
            self._last = now
            steps = done - self._first
            left = f", {_clock((now - self._began) / steps * (total - done))} left" if steps > 0 else ""
            print(f"  {what}: {done}/{total}{left}", file=self.stream, flush=True)

    def stage_done(self) -> None:
        """Ends the current bar and restarts the clock of the plain lines."""
        self.close()
        self._last = time.monotonic()
        self._step = ""

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _show(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            times = (TimeElapsedColumn(), TextColumn("time left"), TimeRemainingColumn())
            columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), *times)
            self._bar = Progress(*columns, console=self.terminal, transient=True)
            self._bar.add_task(what, total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], description=what, completed=done, total=total)


def _clock(seconds: float) -> str:
    """Minutes and seconds, as 4:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


class _Warnings(logging.Handler):
    """Prints the warnings that our packages log on the console, one line each."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.warn(record.getMessage())
