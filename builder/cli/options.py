"""Options that several commands share, and the example at the end of a help page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from plugins.common import defaults

F = TypeVar("F", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)


def example(text: str) -> str:
    """The epilog of a help page: one command to try."""
    return "\b\nExample:\n  " + "\n  ".join(text.splitlines())


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")(command)


def recipe_options(command: F) -> F:
    """MODEL or RECIPE.yaml, --preset and --set, as `build` and `plan` take them."""
    override = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key.")
    preset = click.option("--preset", metavar="NAME", help="Use this preset: fp8-2of4, fp8, ...; see docs/recipe.md.")
    return click.argument("target", metavar="MODEL|RECIPE.yaml")(preset(override(command)))


def gpu_option(command: F) -> F:
    return click.option("--gpu", default=defaults.GPU, help="Predict times for this GPU.")(command)
