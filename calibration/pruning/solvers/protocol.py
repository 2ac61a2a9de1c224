"""What a pruning method is: statistics of a layer's inputs in, pruned weight out.

Suffixes: N out_features, K in_features.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from calibration.pruning.solvers.hessian import inverse_factor
from calibration.pruning.solvers.masks import Pattern
from plugins.sparsity.segments import Segments


@dataclass
class Statistics:
    """Second moments of one layer's inputs over the calibration tokens, float32, divided by their number.

    With X [tokens, K] the inputs that the pruned part of the model gives, `hessian` [K, K] is X'X. Against the dense
    model there is one of two. With X_d its inputs, `cross` [K, K] is X_d'X. Where the layer's output is added to the
    residual stream, R before it and D [tokens, N] after it in the dense model, `wanted` [N, K] is (D - R)'X: of the
    outputs that would undo all that was changed before.
    """

    hessian: Tensor
    cross: Tensor | None = None
    wanted: Tensor | None = None
    _factor: tuple[Tensor, float] | None = field(default=None, repr=False)

    def reorder(self, order_K: Tensor) -> Statistics:
        """Those of the inputs in the order [K], place -> input."""
        hessian_KK = self.hessian[order_K][:, order_K]
        cross_KK = None if self.cross is None else self.cross[order_K][:, order_K]
        return Statistics(hessian_KK, cross_KK, None if self.wanted is None else self.wanted[:, order_K])

    def factor(self, name: str) -> tuple[Tensor, float]:
        """The upper triangular U [K, K] with U'U = (hessian + damping)^-1, and the damping that this took.

        Found once for all the layers that share the statistics.
        """
        if self._factor is None:
            self._factor = inverse_factor(name, self.hessian)
        return self._factor


class Solver(Protocol):
    """A pruning method. The weight that it returns is sparse in the pattern where `segments` ask, and holds no -0."""

    needs_inputs: bool  # whether it reads `hessian`
    needs_dense_inputs: bool  # whether it reads `cross` or `wanted`
    tunes_blocks: bool  # whether a block's layers are tuned together once each is pruned; needs the dense inputs
    refits_head: bool  # whether the output head, if it is not the embedding, makes up for what is left; needs them too

    def prune(
        self, name: str, weight_NK: Tensor, statistics: Statistics | None, pattern: Pattern, segments: Segments
    ) -> Tensor:
        """The pruned weight, float32 [N, K]. `name` is the layer's, for errors and warnings."""
        ...
