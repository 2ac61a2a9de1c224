"""Writes a deployment's files, each file or directory whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

TEMPLATE_DIRECTORY = Path(__file__).parent / "templates"


def replace(place: Path, content: str | Mapping[str, str]) -> None:
    """Writes a file, or a directory of files by relative name, under a temporary name and renames it to `place`."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=place.parent) as scratch:
        new = Path(scratch) / "new"
        for name, text in [("", content)] if isinstance(content, str) else content.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(text, encoding="utf8")
        if place.exists():
            shutil.move(place, Path(scratch) / "old")
        new.rename(place)


def relative(target: Path, start: Path, within: Path) -> str:
    """The path from the directory `start` to `target` if both are `within` one directory, else the absolute path."""
    target, start = target.resolve(), start.resolve()
    return os.path.relpath(target, start) if target.is_relative_to(within.resolve()) else str(target)
