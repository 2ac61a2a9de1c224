"""sparsity.json beside a checkpoint: which layers are sparse, whole or in part, and their channels' order. No torch.

    {"pattern": "2:4", "method": "reconstruct",
     "layers": ["model.layers.0.self_attn.q_proj", ...],                            sparse as a whole
     "hybrid": {"model.layers.3.mlp.up_proj": {"axis": "rows", "segments": [["2:4", 768], ["dense", 768]]}, ...},
     "order": {"model.layers.3.mlp": "7 0 12 ...", ...}}                            place -> channel of the dense model

The checkpoint's weights are ordinary dense tensors in the new order: a reader that knows nothing of this file computes
the same numbers. `pattern` is that of all sparse layers and segments; `hybrid` and `order` are left out where there are
none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plugins.common.errors import UserError
from plugins.common.json_files import read_json, write_json
from plugins.common.patterns import PATTERNS, TENSOR_CORE, Pattern
from plugins.sparsity.segments import Segments

FILE = "sparsity.json"
EXAMPLE = 'it is not of the form {"pattern": "2:4", "layers": [...]}'


@dataclass(frozen=True)
class Declaration:
    """What a checkpoint claims."""

    layers: tuple[str, ...] = ()
    hybrid: dict[str, Segments] = field(default_factory=dict)
    order: dict[str, tuple[int, ...]] = field(default_factory=dict)  # a block's `mlp`: channels; `self_attn`: KV heads
    method: str = ""
    pattern: Pattern = TENSOR_CORE

    @property
    def pruned(self) -> tuple[str, ...]:
        """The layers with any sparse part."""
        return (*self.layers, *self.hybrid)

    def require_whole_layers(self) -> None:
        """Raises UserError where a layer is sparse in part: a TensorRT engine would run it dense, unnoticed."""
        if self.hybrid:
            raise UserError(
                f"'{next(iter(self.hybrid))}' is {self.pattern} in part ({len(self.hybrid)} layers are), and TensorRT "
                f"engines run layers that are wholly {self.pattern}",
                "use engine.backend=torch, or remove sparsity.fraction and sparsity.budget",
            )

    @classmethod
    def parse(cls, content: Any) -> Declaration:
        """Raises UserError, one line that names the first fault."""
        if not isinstance(content, dict) or "pattern" not in content:
            raise UserError(EXAMPLE)
        if (pattern := content["pattern"]) not in PATTERNS:
            raise UserError(f"its pattern {pattern!r} is not one of {', '.join(PATTERNS)}")
        layers, hybrid, order = content.get("layers"), content.get("hybrid", {}), content.get("order", {})
        if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
            raise UserError(EXAMPLE)
        if not isinstance(hybrid, dict) or not isinstance(order, dict):
            raise UserError("its 'hybrid' and 'order' are not tables")
        if both := sorted(set(layers) & hybrid.keys()):
            raise UserError(f"it declares {both[0]!r} wholly and partly {pattern}")
        segments = {layer: Segments.parse(layer, value, pattern) for layer, value in hybrid.items()}
        orders = {module: _parse_order(module, value) for module, value in order.items()}
        return cls(tuple(layers), segments, orders, str(content.get("method", "")), pattern)

    @classmethod
    def read(cls, directory: Path) -> Declaration:
        """Of the checkpoint in `directory`; empty where it has no such file. Raises UserError."""
        path = directory / FILE
        if not path.is_file():
            return cls()
        try:
            return cls.parse(read_json(path))
        except (ValueError, RecursionError) as error:  # UserError is a ValueError too
            raise UserError(f"'{path}': {error}: export the checkpoint again") from None

    def to_json(self) -> dict[str, Any]:
        """What `parse` reads."""
        content: dict[str, Any] = {"pattern": self.pattern, "method": self.method, "layers": list(self.layers)}
        if self.hybrid:
            content["hybrid"] = {layer: segments.to_json() for layer, segments in self.hybrid.items()}
        if self.order:
            content["order"] = {module: " ".join(map(str, order)) for module, order in self.order.items()}
        return content

    def write(self, directory: Path) -> None:
        """Writes the file, or none where nothing is declared."""
        if self.pruned or self.order:
            write_json(directory / FILE, self.to_json())


def _parse_order(module: str, value: Any) -> tuple[int, ...]:
    try:
        order = tuple(map(int, value.split()))
    except (AttributeError, ValueError):
        raise UserError(f"the order of {module!r} is not a list of numbers") from None
    if sorted(order) != list(range(len(order))):
        raise UserError(f"the order of {module!r} does not contain each channel from 0 to {len(order) - 1} once")
    return order
