"""The sparsity lines of a TensorRT build log: which layers were eligible for sparse tactics, and which got one.

TensorRT has worded the two lines in two ways:

- up to 8.x, and torch-TensorRT on top of it, with names (also none, and then nothing follows the colon):
  `(Sparsity) Layers eligible for sparse math: conv1, conv2` and
  `(Sparsity) TRT inference plan picked sparse implementation for layers: conv2`
- in 10.x, with a count, and the names where the build is verbose enough:
  `(Sparsity) Found 39 layer(s) eligible to use sparse tactics` and `(Sparsity) Chose 0 layer(s) using sparse tactics`

Each may come once per tactic-selection pass; the last pair is about the engine that is written. A log without them
gives no result. Eligible is not picked: TensorRT times both and keeps the faster.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["picked", "eligible", "none", "unknown"]

# What a logger puts before a message: "[08/05/2024-12:06:54] [TRT] [I]", "INFO: [Torch-TensorRT] -", "[TensorRT] INFO:"
_PREFIX = re.compile(r"^\s*(\[[^\]]*\]|\w+:|&&&&)")
_COMMA = re.compile(r",(?![^({]*[)}])")  # between names, not inside one such as `aten::linear(%x, %w)`
_TERMINALS = range(79, 400)  # widths at which a terminal may have broken a line
_ELIGIBLE = re.compile(
    r"\(Sparsity\) (?:Layers eligible for sparse math|Found (?P<count>\d+) layer\(s\) eligible to use sparse tactics)"
    r":?(?P<names>.*)"
)
_PICKED = re.compile(
    r"\(Sparsity\) (?:TRT inference plan picked sparse implementation for layers"
    r"|Chose (?P<count>\d+) layer\(s\) using sparse tactics):?(?P<names>.*)"
)


@dataclass(frozen=True)
class Layers:
    """The layers that one line counts; `names` is empty where the line gives only the count."""

    count: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class SparsityLog:
    """The log's counts. `eligible` or `picked` is None where the log has no such line."""

    eligible: Layers | None
    picked: Layers | None

    @property
    def status(self) -> Status:
        """`picked` where a sparse tactic runs, `eligible` where TensorRT weighed and refused, `none`, or `unknown`."""
        if self.picked is None:
            return "unknown"
        if self.picked.count:
            return "picked"
        if self.eligible is None:
            return "unknown"
        return "eligible" if self.eligible.count else "none"

    def of(self, module: str) -> Status:
        """The same of one module, such as `transformer.layers.0.attention.qkv`; `unknown` where names are missing."""
        if self.picked is None:
            return "unknown"
        if _names(module, self.picked.names):
            return "picked"
        if len(self.picked.names) < self.picked.count or self.eligible is None:
            return "unknown"
        if _names(module, self.eligible.names):
            return "eligible"
        return "none" if len(self.eligible.names) >= self.eligible.count else "unknown"

    @property
    def summary(self) -> str:
        """One sentence for a person."""
        match self.status:
            case "picked":
                assert self.picked is not None
                of = f" of {self.eligible.count} eligible" if self.eligible else ""
                return f"TensorRT picked sparse tactics for {self.picked.count} layers{of}"
            case "eligible":
                assert self.eligible is not None
                return (
                    f"TensorRT lists {self.eligible.count} eligible layers and picked none: dense tactics were faster"
                )
            case "none":
                return "TensorRT lists no eligible layer: their weights reach it through a plugin, or are not 2:4"
            case _:
                return "the build log has no line on sparsity: which tactics run is unknown"


def parse(text: str) -> SparsityLog:
    """Reads a build log of any length. Never raises: unreadable entries are unknown."""
    eligible = picked = None
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if match := _ELIGIBLE.search(line):
            eligible = _layers(match, lines[number:])
        elif match := _PICKED.search(line):
            picked = _layers(match, lines[number:])
    return SparsityLog(eligible, picked)


def _layers(match: re.Match[str], lines: Sequence[str]) -> Layers:
    """The names after the colon of `lines[0]`, with what a terminal of its width broke off joined again."""
    listed, width = match["names"], len(lines[0])
    for last, line in itertools.pairwise(lines):
        broken = listed.strip() and width in _TERMINALS and len(last) in (width - 1, width)
        if not broken or not line.strip() or _PREFIX.match(line) or "(Sparsity)" in line:
            break
        listed += line
    names = tuple(re.sub(r"\s*\+\s*", " + ", name.strip()) for name in _COMMA.split(listed) if name.strip())
    return Layers(int(match["count"]) if match["count"] else len(names), names)


def _names(module: str, layers: Sequence[str]) -> bool:
    """Whether a TensorRT layer name, or a fusion of several, comes from the module.

    TensorRT-LLM names layers `<model class>/<module path with slashes>/<layer type>_<number>`.
    """
    path = re.compile(rf"(^|/){re.escape(module.replace('.', '/'))}(/|$)")
    return any(path.search(part.strip().replace(".", "/")) for layer in layers for part in layer.split(" + "))
