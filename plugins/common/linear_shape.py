"""A linear layer as every package describes it: its sizes, number format and sparsity. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from plugins.common.formats import format_of
from plugins.common.patterns import TENSOR_CORE, Pattern, bytes_per_weight


@dataclass(frozen=True)
class LinearShape:
    """A linear layer with a weight [out_features, in_features], whose share `fraction` holds `pattern`.

    `name` is empty where only the size matters, as of a product to time.
    """

    out_features: int
    in_features: int
    format: str = "bf16"
    fraction: float = 0.0
    pattern: Pattern = TENSOR_CORE
    name: str = ""
    bias: bool = False

    def __str__(self) -> str:
        return f"{self.format} [{self.out_features}, {self.in_features}]"

    @classmethod
    def from_facts(cls, name: str, facts: Mapping[str, Any]) -> LinearShape:
        """From a layer of tactics.json."""
        sizes = (facts["out_features"], facts["in_features"])
        return cls(*sizes, facts["format"], facts["fraction"], facts["pattern"], name)

    @property
    def facts(self) -> dict[str, Any]:
        """The part that the layer's entries in plan.json, tactics.json and report.json have in common."""
        sizes = {"out_features": self.out_features, "in_features": self.in_features}
        return {**sizes, "format": self.format, "sparse": self.sparse}

    @property
    def sparse(self) -> bool:
        """Whether any of the weight holds the pattern."""
        return self.fraction > 0

    @property
    def numel(self) -> int:
        """Values of the weight, zeros included."""
        return self.out_features * self.in_features

    @property
    def nbytes(self) -> float:
        """Bytes of the weight without scales, its sparse part packed: 2:4 takes 0.5625 of 16 bit, 0.625 of 8 bit."""
        dense = format_of(self.format).nbytes
        return self.numel * ((1 - self.fraction) * dense + self.fraction * bytes_per_weight(self.pattern, dense))

    @property
    def bytes_saved_by_pruning(self) -> int:
        """Bytes that pruning all of the layer saves in its number format; 0 for a dense layer."""
        return round(replace(self, fraction=0.0).nbytes - replace(self, fraction=float(self.sparse)).nbytes)
