"""The hash of a stage's own code, so that a changed program never serves an output of the old one."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("builder", "calibration", "benchmarks", "plugins")


def code_digest(modules: Sequence[str], *more: str) -> str:
    """The sha256 of the source of `modules`, of all modules of this project that they import, and of `more` text."""
    digest = hashlib.sha256("\0".join(more).encode())
    for module in sorted(_closure(tuple(modules))):
        digest.update(f"\0{module}\0".encode() + _read(module))
    return digest.hexdigest()


def _closure(modules: Sequence[str]) -> set[str]:
    reached: set[str] = set()
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += _imports(module)
    return reached


@cache
def _imports(module: str) -> tuple[str, ...]:
    """The modules of this project that the source of `module` imports, also inside functions; not for types alone."""
    tree = ast.parse(_read(module))
    names = (name for node in _nodes(tree) for name in _imported_names(node))
    return tuple({name for name in names if name.split(".")[0] in PACKAGES and _is_module(name)})


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield child
            yield from _nodes(child)


def _imported_names(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def _is_module(name: str) -> bool:
    return _source(name) is not None


def _read(module: str) -> bytes:
    path = _source(module)
    assert path is not None, f"no module {module}"
    return path.read_bytes()


@cache
def _source(module: str) -> Path | None:
    """The file of a module or package, without importing it; None for a name that is neither."""
    package, *parts = module.split(".")
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    base = Path(spec.origin).parent.joinpath(*parts)
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.is_file()), None)
