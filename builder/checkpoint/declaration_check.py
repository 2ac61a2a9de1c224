"""Reads the layers that a checkpoint's sparsity.json declares; reports declarations that do not fit the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from builder.checkpoint.tensor_files import read_table
from builder.checkpoint.violations import Code, Report, Violation
from plugins.common.errors import UserError
from plugins.sparsity.declaration import FILE, Declaration
from plugins.sparsity.segments import Segments


def read_declaration(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], head_widths: Mapping[str, int], report: Report
) -> Declaration:
    """What `sparsity.json` declares of layers that are in the model; nothing where there is no such file.

    `shapes` are the model's layers with their rows and inputs; `head_widths` are those of a key-value head, by a
    layer's last name.
    """
    content = read_table(directory / FILE, report)
    if content is None:
        return Declaration()
    try:
        declared = Declaration.parse(content)
    except UserError as error:
        report(Violation(Code.CONFIG, str(error), FILE))
        return Declaration()
    hybrid = dict(declared.hybrid)
    for layer in declared.pruned:
        if layer not in shapes:
            report(Violation(Code.CONFIG, f"it declares {layer!r}, and the model has no such layer", FILE))
            hybrid.pop(layer, None)
        elif layer in hybrid and (size := shapes[layer][hybrid[layer].axis == "inputs"]) != hybrid[layer].size:
            problem = f"the segments of {layer!r} cover {hybrid[layer].size} of its {size} {hybrid[layer].axis}"
            report(Violation(Code.CONFIG, problem, FILE))
            del hybrid[layer]
        elif layer in hybrid and (cut := _cut(hybrid[layer], head_widths.get(layer.rsplit(".", 1)[-1], 1))):
            problem = f"a segment of {layer!r} begins at {cut}, within a head: both kinds must hold whole heads"
            report(Violation(Code.CONFIG, problem, FILE))
            del hybrid[layer]
    layers = tuple(layer for layer in declared.layers if layer in shapes)
    return Declaration(layers, hybrid, declared.order, declared.method, declared.pattern)


def _cut(segments: Segments, width: int) -> int | None:
    """Where the first segment begins that does not begin with a head of `width` rows or inputs."""
    return next((part.start for part in segments.parts if part.start % width), None)
