"""Writes docs/commands.md from the commands' own help pages; `--check` fails where it is stale.

python docs/make_help.py [--check]
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from builder.cli.commands import cli

PAGE = Path(__file__).parent / "commands.md"
WIDTH = 100


def page() -> str:
    parts = ["# Commands\n\nMade by `make docs` from the help pages; do not edit.\n"]
    root = click.Context(cli, info_name="twofour", **cli.context_settings)
    for context in contexts(root):
        parts.append(f"## {context.command_path}\n\n```text\n{context.get_help()}\n```\n")
    return "\n".join(parts)


def contexts(context: click.Context) -> Iterator[click.Context]:
    """The context of a command, then of each of its subcommands."""
    context.terminal_width = context.max_content_width = WIDTH
    yield context
    if isinstance(context.command, click.Group):
        for name, command in sorted(context.command.commands.items()):
            yield from contexts(click.Context(command, info_name=name, parent=context))


if __name__ == "__main__":
    if "--check" in sys.argv:
        if not PAGE.is_file() or PAGE.read_text() != page():
            sys.exit("docs/commands.md is stale: run make docs")
    else:
        PAGE.write_text(page())
