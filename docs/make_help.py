"""Renders docs/commands.md from the commands' own help pages."""

from collections.abc import Iterator

import click

from builder.cli.commands import cli

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
