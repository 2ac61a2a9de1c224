"""What a pruning method is: statistics of a layer's inputs in, pruned weight out.

Suffixes: N out_features, K in_features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from calibration.solvers.masks import Pattern


@dataclass
class Statistics:
    """Second moments of one layer's inputs over the calibration tokens, float32 [K, K], divided by their number.

    With X [tokens, K] the inputs that the pruned part of the model gives, and X_d those of the dense model:
    `hessian` is X'X / tokens, `cross` is X_d'X / tokens.
    """

    hessian: Tensor
    cross: Tensor | None = None


class Solver(Protocol):
    """A pruning method. The weight that it returns is sparse in the pattern and holds no -0."""

    needs_inputs: bool  # whether it reads `hessian`
    needs_dense_inputs: bool  # whether it reads `cross`

    def prune(self, name: str, weight_NK: Tensor, statistics: Statistics | None, pattern: Pattern) -> Tensor:
        """The pruned weight, float32 [N, K]. `name` is the layer's, for errors and warnings."""
        ...
