"""The package in a pytorch engine that gives TensorRT-LLM the model with sparse layers: twofour_sparse/.

__init__.py    registers the architecture again; importing it is enough
__main__.py    trtllm-serve after that, on every release: python3 -m twofour_sparse ENGINE ...
layers.json    the 2:4 layers, and the measured kernels where there are any
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.checkpoint import Checkpoint
from builder.engines.trtllm.launch import TEMPLATE_DIRECTORY
from plugins.common.families import FAMILIES
from plugins.common.json_files import write_json
from plugins.common.templates import render

NAME = "twofour_sparse"


def write(engine: Path, checkpoint: Checkpoint, tactics: Mapping[str, Any] | None) -> None:
    """Writes the package into `engine`, for the checkpoint's 2:4 layers."""
    directory = engine / NAME
    directory.mkdir(parents=True, exist_ok=True)
    architecture = checkpoint.architecture.name
    module = FAMILIES[architecture].trtllm.pytorch_module
    pages = {
        # workers import the class by where it is defined: it must be here, under this package's name
        "__init__.py": render(TEMPLATE_DIRECTORY, "sparse_init.py", architecture=architecture, module=module),
        "__main__.py": render(TEMPLATE_DIRECTORY, "sparse_main.py"),
    }
    for name, page in pages.items():
        (directory / name).write_text(page, encoding="utf8")
    layers = {name: _choices(tactics, name) for name in checkpoint.whole_sparse_layers}
    write_json(directory / "layers.json", {"layers": layers})


def _choices(tactics: Mapping[str, Any] | None, layer: str) -> list[tuple[int, str]] | None:
    """(tokens, kernel) of a layer that was measured; None where nothing was."""
    if tactics is None or tactics["source"] != "measured" or layer not in tactics["layers"]:
        return None
    return [(bucket["tokens"], bucket["kernel"]) for bucket in tactics["layers"][layer]["buckets"]] or None
