"""The interface of a pruning method: statistics of a layer's inputs in, pruned weight out.

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

    `hessian` [K, K] is X'X with X [tokens, K] the layer's inputs in the pruned model. At most one of the others is set:
    `cross` [K, K] is X_d'X with X_d the layer's inputs in the dense model. Where the layer's output is added to the
    residual stream, `residual_cross` [N, K] is (D - R)'X with R the stream before the layer in the pruned model and
    D [tokens, N] the stream after it in the dense model: outputs D - R would undo all earlier changes.
    """

    hessian: Tensor
    cross: Tensor | None = None
    residual_cross: Tensor | None = None
    _factor: tuple[Tensor, float] | None = field(default=None, repr=False)

    def reorder(self, order_K: Tensor) -> Statistics:
        """Those of the inputs in the order [K], place -> input."""
        hessian_KK = self.hessian[order_K][:, order_K]
        cross_KK = None if self.cross is None else self.cross[order_K][:, order_K]
        residual_cross_NK = None if self.residual_cross is None else self.residual_cross[:, order_K]
        return Statistics(hessian_KK, cross_KK, residual_cross_NK)

    def factor(self, name: str) -> tuple[Tensor, float]:
        """The upper triangular U [K, K] with U'U = (hessian + damping)^-1, and the damping that this took.

        Computed once for all layers that share the statistics.
        """
        if self._factor is None:
            self._factor = inverse_factor(name, self.hessian)
        return self._factor


class Solver(Protocol):
    """A pruning method. The weight that it returns is sparse within the sparse `segments`, and holds no -0.

    A method extends this class and sets the attributes that differ.
    """

    needs_inputs: bool = True  # whether it reads `hessian`
    needs_dense_inputs: bool = False  # whether it reads `cross` or `residual_cross`
    tunes_blocks: bool = False  # whether a pruned block's layers are fine-tuned together; needs the dense inputs
    refits_head: bool = False  # whether an untied output head compensates for the rest; needs them too

    def prune(
        self, name: str, weight_NK: Tensor, statistics: Statistics | None, pattern: Pattern, segments: Segments
    ) -> Tensor:
        """The pruned weight, float32 [N, K]. `name` is the layer's, for errors and warnings."""
        ...
