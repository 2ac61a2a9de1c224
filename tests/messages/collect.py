"""Collects the text of every error that the code can raise at a user, from its source.

python tests/messages/collect.py     writes messages.txt: read its diff before you commit

A line is `file: message`, with `{expression}` where a value is filled in and `-> hint` for an error's second argument.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SNAPSHOT = Path(__file__).parent / "messages.txt"
PACKAGES = ("builder", "calibration", "benchmarks", "plugins")
ROOTS = {"UserError", "GateError", "warning"}  # and log.warning


def collect() -> list[str]:
    """Every message, in the order of files and lines."""
    nodes = {path: list(ast.walk(ast.parse(path.read_text(encoding="utf8")))) for path in _files()}
    errors = _errors([node for each in nodes.values() for node in each if isinstance(node, ast.ClassDef)])
    return [
        f"{path.relative_to(ROOT).as_posix()}: {message}"
        for path, each in nodes.items()
        for message in dict.fromkeys(_messages(each, errors))
    ]


def _files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _errors(classes: Iterable[ast.ClassDef]) -> set[str]:
    """The names of the roots and of all their subclasses."""
    errors, before = set(ROOTS), 0
    while len(errors) > before:
        before = len(errors)
        errors |= {each.name for each in classes if errors & {_name(base) for base in each.bases}}
    return errors


def _messages(nodes: Iterable[ast.AST], errors: set[str]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Call) and _name(node.func) in errors and node.args:
            yield " -> ".join(_text(value) for value in [*node.args, *(word.value for word in node.keywords)])


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    if isinstance(node, ast.IfExp):
        return f"{{{_text(node.body)} | {_text(node.orelse)}}}"
    return "{" + ast.unparse(node.value if isinstance(node, ast.FormattedValue) else node) + "}"


if __name__ == "__main__":
    SNAPSHOT.write_text("\n".join(collect()) + "\n", encoding="utf8")
