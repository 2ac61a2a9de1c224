"""Which layers of a built TensorRT engine run sparse tactics, from the engine inspector's JSON.

Needs an engine that was built with detailed profiling verbosity. A tactic's name shows it: `sm80_xmma_sparse_gemm_...`,
`..._spgemm_...`, `..._spmma...`. Layers that TensorRT fuses keep the names of their parts in Name or Metadata.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

_SPARSE = re.compile(r"sparse|spmma|sp_?gemm|sptensor", re.IGNORECASE)


@dataclass(frozen=True)
class SparseTactic:
    """One engine layer on a sparse tactic. `layer` is all that the inspector prints of its name and origin."""

    layer: str
    tactic: str

    def is_of(self, module: str) -> bool:
        """Whether the layer comes from this module of TensorRT-LLM's, such as transformer.layers.0.attention.qkv."""
        path = re.escape(module.replace(".", "/"))
        return re.search(rf"(^|[^\w]){path}([^\w]|$)", self.layer.replace(".", "/")) is not None


def parse(text: str) -> list[SparseTactic] | None:
    """The sparse tactics in the inspector's JSON; None where it has no tactics (built without detailed verbosity)."""
    try:
        layers = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError):
        return None
    detailed: list[dict[str, Any]] = [layer for layer in layers if isinstance(layer, dict) and "TacticName" in layer]
    if not detailed:
        return None
    return [
        SparseTactic(f"{layer.get('Name', '')} {layer.get('Metadata', '')}", str(layer["TacticName"]))
        for layer in detailed
        if _SPARSE.search(str(layer["TacticName"]))
    ]
