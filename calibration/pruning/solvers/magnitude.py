"""Keeps the largest weights. Han et al., Learning both Weights and Connections, NeurIPS 2015, arXiv:1506.02626."""

from __future__ import annotations

from torch import Tensor

from calibration.pruning.solvers.masks import Pattern, apply, dense_part
from calibration.pruning.solvers.protocol import Solver, Statistics
from plugins.sparsity.segments import Segments


class Magnitude(Solver):
    """Looks at no activations."""

    needs_inputs = False

    def prune(
        self, name: str, weight_NK: Tensor, statistics: Statistics | None, pattern: Pattern, segments: Segments
    ) -> Tensor:
        """Keeps the largest |w|."""
        return apply(weight_NK, pattern.select(weight_NK.abs()) | dense_part(weight_NK, segments))
