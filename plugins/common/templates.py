"""Pages from jinja templates: scripts, configuration and Python, not HTML."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2


def render(directory: Path, template: str, **values: Any) -> str:
    """The page `directory/<template>.jinja`; a value that it needs and lacks is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(directory),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    environment.filters["quoted"] = lambda text: '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return environment.get_template(f"{template}.jinja").render(version=version("twofour"), **values)
