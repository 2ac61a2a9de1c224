"""The package in a pytorch engine that gives TensorRT-LLM the model with sparse layers: twofour_sparse/.

__init__.py    registers the architecture again; importing it is enough
__main__.py    trtllm-serve after that, on every release: python3 -m twofour_sparse ENGINE ...
layers.json    the 2:4 layers, and the measured kernels where there are any
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from builder.checkpoint import Checkpoint
from plugins.common.families import FAMILIES
from plugins.common.json_files import write_json

NAME = "twofour_sparse"

# The class must be defined here, under this package's name: workers import the class by where it is defined.
_INIT_PY = '''\
"""{architecture} once more, with this engine's 2:4 layers on sparse kernels. TensorRT-LLM imports this package."""

from pathlib import Path

try:
    from plugins.tensorrt_llm.releases import naming_the_release
except ModuleNotFoundError:
    raise ImportError(f"'{{__file__}}' needs twofour in this Python: pip install twofour=={version}") from None

with naming_the_release():
    from tensorrt_llm._torch.models import {module}
    from tensorrt_llm._torch.models.modeling_utils import register_auto_model

    from plugins.tensorrt_llm.pytorch_backend import SparseLinears

    @register_auto_model("{architecture}")
    class {architecture}(SparseLinears, {module}.{architecture}):
        layers_file = Path(__file__).with_name("layers.json")
'''

_MAIN_PY = '''\
"""trtllm-serve with this engine's sparse layers registered."""

from plugins.tensorrt_llm.serve import main

if __name__ == "__main__":  # MPI workers import this file under another name
    main(__package__)
'''


def write(engine: Path, checkpoint: Checkpoint, tactics: Mapping[str, Any] | None) -> None:
    """Writes the package into `engine`, for the checkpoint's 2:4 layers."""
    directory = engine / NAME
    directory.mkdir(parents=True, exist_ok=True)
    architecture = checkpoint.architecture.name
    page = _INIT_PY.format(
        architecture=architecture,
        module=FAMILIES[architecture].trtllm.pytorch_module,
        version=metadata.version("twofour"),
    )
    (directory / "__init__.py").write_text(page, encoding="utf8")
    (directory / "__main__.py").write_text(_MAIN_PY, encoding="utf8")
    layers = {name: _choices(tactics, name) for name in checkpoint.whole_sparse_layers}
    write_json(directory / "layers.json", {"layers": layers})


def _choices(tactics: Mapping[str, Any] | None, layer: str) -> list[tuple[int, str]] | None:
    """(tokens, kernel) of a layer that was measured; None where nothing was."""
    if tactics is None or tactics["source"] != "measured" or layer not in tactics["layers"]:
        return None
    return [(bucket["tokens"], bucket["kernel"]) for bucket in tactics["layers"][layer]["buckets"]] or None
