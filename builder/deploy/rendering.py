"""Writes pages from templates, each file or directory whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2

_TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """The page `templates/<template>.jinja`; a value that it needs and lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # configuration and Python, not HTML
    )
    environment.filters["quoted"] = lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return environment.get_template(f"{template}.jinja").render(version=version("twofour"), **values)


def replace(place: Path, content: str | Mapping[str, str]) -> None:
    """Writes a file, or a directory of files by relative name, beside `place` and renames it to `place`."""
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
