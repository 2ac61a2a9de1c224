"""Runs the `twofour` command line in this process, as a person's shell would see it."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from builder.cli import commands


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def twofour(*arguments: object) -> Outcome:
    """Runs `twofour arguments...` through `main`, the console script's own entry. An exception other than exit escapes:
    it would be a traceback.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["twofour", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            commands.main()
        except SystemExit as end:
            return Outcome(int(end.code or 0), out.getvalue(), err.getvalue())
    raise AssertionError("main() did not end with an exit status")


def done(*arguments: object) -> Outcome:
    """A command that must succeed."""
    outcome = twofour(*arguments)
    assert outcome.status == 0, outcome.stderr
    return outcome


def refused(*arguments: object) -> str:
    """The error of a command that must end as invalid input does: one line on stderr, exit status 2, nothing on stdout.

    Give `--json` to a build, which otherwise also prints its progress on stderr.
    """
    outcome = twofour(*arguments)
    assert outcome.status == 2, outcome
    assert outcome.stdout == ""
    lines = outcome.stderr.splitlines()
    assert len(lines) == 1, outcome.stderr
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


def nothing_left(out: Path) -> bool:
    """Whether neither `out` nor a half of it, nor a lock, lies in its folder."""
    return not out.exists() and not list(out.parent.glob(f".{out.name}*"))
