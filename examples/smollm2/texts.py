"""Text for calibration and evaluation that every Python carries: (source, text) pairs, in a fixed order.

Four kinds: docstrings, the language reference and source code of Python (PSF licence), and the descriptions of the
installed packages (each package's licence). A kind that calibration lacks shows what pruning costs on other text.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import sys
from collections.abc import Iterator
from itertools import islice
from types import ModuleType

SHORTEST, LONGEST = 400, 6000  # characters of a text
MOST_PIECES = 3  # of a package's description
PIECE = 2500  # characters after which a long text is cut, at the end of a paragraph
SKIPPED = {"antigravity", "this", "idlelib", "lib2to3", "test", "tkinter", "turtle", "turtledemo"}  # they open windows
Texts = Iterator[tuple[str, str]]


def modules() -> Iterator[ModuleType]:
    """The standard library's modules that can be imported here, in alphabetical order."""
    known = sys.stdlib_module_names
    for name in sorted(info.name for info in pkgutil.iter_modules() if info.name in known - SKIPPED):
        try:
            yield importlib.import_module(name)
        except Exception:  # a module of another system
            continue


def docstrings(module: ModuleType) -> Texts:
    """Of a module and of the functions, classes and methods that are its own, each text once."""
    documented = {module.__name__: inspect.getdoc(module)}
    for name, value in sorted(vars(module).items()):
        if getattr(value, "__module__", None) != module.__name__ or not (inspect.isclass(value) or callable(value)):
            continue
        documented[f"{module.__name__}.{name}"] = inspect.getdoc(value)
        if inspect.isclass(value):
            for part, method in sorted(vars(value).items()):
                if callable(method):
                    documented[f"{module.__name__}.{name}.{part}"] = getattr(method, "__doc__", None)
    texts = {
        text: name for name, text in documented.items() if isinstance(text, str) and SHORTEST <= len(text) <= LONGEST
    }
    for text, name in texts.items():
        yield name, inspect.cleandoc(text)


def source_code(module: ModuleType) -> Texts:
    """Pieces of a module's source; none of a module that is not written in Python."""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return
    for piece in pieces(source):
        yield f"source of {module.__name__}", piece


def language_reference() -> Texts:
    """Pieces of the language reference, as `help()` prints it."""
    topics = importlib.import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        for piece in pieces(topics[topic]):
            yield f"language reference, {topic}", piece


def package_descriptions() -> Texts:
    """Pieces of the README that each installed package carries in its metadata."""
    packages = {package.metadata["Name"]: package for package in importlib.metadata.distributions()}
    for name in sorted(packages, key=str.lower):
        description = packages[name].metadata.get_payload()
        for piece in islice(pieces(description if isinstance(description, str) else ""), MOST_PIECES):
            yield f"description of the package {name}", piece


def pieces(text: str) -> Iterator[str]:
    """Cuts a text at the ends of paragraphs."""
    piece = ""
    for paragraph in text.split("\n\n"):
        piece += paragraph + "\n\n"
        if len(piece) > PIECE:
            yield piece[:LONGEST]
            piece = ""
    if len(piece) >= SHORTEST:
        yield piece
