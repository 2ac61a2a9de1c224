"""How a long computation reports how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with (task, steps done, steps in all)."""


def silent(task: str, done: int, total: int) -> None:
    """Reports nothing."""
