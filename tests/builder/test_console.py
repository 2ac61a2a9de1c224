"""The plain lines of a build that does not run on a terminal."""

from __future__ import annotations

import pytest

from builder import console


def test_time_left_counts_from_the_first_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A first step that other work delayed gives no rate: 45 s of loading made 902 tensors last 12 hours."""
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    output = console.Console()
    now = 48.0
    output.progress("verify", 1, 902)
    now = 78.0
    output.progress("verify", 301, 902)
    assert capsys.readouterr().err.splitlines() == ["  verify: 1/902", "  verify: 301/902, 1:00 left"]
