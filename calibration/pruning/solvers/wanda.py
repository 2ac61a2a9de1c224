"""Keeps the weights that matter most to the outputs. Sun et al., ICLR 2024, arXiv:2306.11695."""

from __future__ import annotations

from torch import Tensor

from calibration.pruning.solvers.hessian import check_finite
from calibration.pruning.solvers.masks import Pattern, apply, dense_part
from calibration.pruning.solvers.protocol import Solver, Statistics
from plugins.sparsity.segments import Segments


class Wanda(Solver):
    """Scores a weight by its size times the norm of its input; compares within a row, never across rows."""

    def prune(
        self, name: str, weight_NK: Tensor, statistics: Statistics | None, pattern: Pattern, segments: Segments
    ) -> Tensor:
        """Keeps the largest |w_ij| * |x_j|. Raises UserError where the inputs are not finite."""
        assert statistics is not None
        check_finite(name, statistics.hessian)
        score_NK = weight_NK.abs() * statistics.hessian.diagonal().sqrt()
        if pattern.group == 0:
            row = Pattern(round(pattern.keep * weight_NK.shape[1]), weight_NK.shape[1])
            return apply(weight_NK, row.select(score_NK))
        return apply(weight_NK, pattern.select(score_NK) | dense_part(weight_NK, segments))
