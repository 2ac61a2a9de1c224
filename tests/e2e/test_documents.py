"""What the documents show works: the README's blocks and every help page's example are run, other commands parsed."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from builder.cli.commands import cli
from tests.support.command import done
from tests.support.models import cut_llama

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")
# run until Ctrl-C, need nvcc, or need an adapter: other tests run them
PARSED_ONLY = ("twofour serve", "twofour route", "twofour plugins build", "twofour adapter")


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of a language, without those that a comment before them marks as not run."""
    actual = re.findall(rf"(<!-- not run: [^>]+-->\n)?```{language}\n(.*?)```", text, re.DOTALL)
    return [block for not_run, block in actual if not not_run]


def commands(text: str, indent: int = 0) -> list[str]:
    """The twofour commands that start a line, after at least `indent` spaces; continued lines joined."""
    return re.findall(rf"^ {{{indent},}}(twofour [^\n`]*)$", text.replace("\\\n", " "), re.MULTILINE)


def help_examples(group: click.Group = cli) -> Iterator[str]:
    for command in group.commands.values():
        if isinstance(command, click.Group):
            yield from help_examples(command)
        else:
            assert command.epilog, f"'{command.name}' has no example on its help page"
            yield from commands(command.epilog)


def arguments(line: str) -> list[str]:
    return shlex.split(line, comments=True)[1:]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory as the documents take it: examples/ with the recipe, and the model with two of its blocks."""
    place = tmp_path_factory.mktemp("documents")
    model = cut_llama(place / "examples" / "docs-llama")
    shutil.copyfile(ROOT / "examples" / "docs-llama" / "calibration.jsonl", model / "calibration.jsonl")
    shutil.copyfile(ROOT / "examples" / "quickstart.yaml", place / "examples" / "quickstart.yaml")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("TWOFOUR_STORE", str(place / "store"))
        yield place


@pytest.mark.parametrize("line", [line for block in blocks(README, "bash") for line in commands(block)])
def test_a_command_of_the_readme(line: str, place: Path) -> None:
    done(*arguments(line))


def test_the_python_of_the_readme(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = blocks(README, "python")
    assert len([line for line in block.splitlines() if line]) <= 6
    exec(compile(block, "README.md", "exec"), {})
    increase, holds = capsys.readouterr().out.splitlines()[0].split()
    assert float(increase) > -1
    assert holds == "True"


@pytest.mark.parametrize(
    "line", sorted(help_examples(), key=lambda line: not line.startswith("twofour build"))
)  # the others use what build writes
def test_the_example_of_a_help_page(line: str, place: Path) -> None:
    if line.startswith(PARSED_ONLY):
        parse(line)
    else:
        done(*arguments(line))


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.name
)
def test_commands_of_the_documents_parse(path: Path) -> None:
    for line in commands(path.read_text(encoding="utf8"), indent=4):
        if "..." not in line and "Usage:" not in line:
            parse(line)


def parse(line: str) -> None:
    """Fails where a command or an option does not exist."""
    command: click.Command = cli
    parts = arguments(line)
    while isinstance(command, click.Group):
        command = command.commands[parts.pop(0)]
    command.make_context(command.name, parts)
