"""Computes the sparse weight whose outputs are nearest to the dense model's, given the pruned model's inputs.

With X the layer's inputs in the pruned model and H = X'X, the sparse V minimises |XV' - T|^2 for the target outputs

    T = (1 - a) XW' + a T_d,

between the layer's dense outputs for these inputs and the outputs T_d that would undo all earlier changes: X_d W' with
the dense model's inputs X_d, or, where outputs are added to a residual stream, the difference of the streams. Up to a
constant that is tr(V H V') - 2 tr(V B') with B = T'X, so second moments suffice. Then, in turn:

1. target: the dense weight that minimises it, B H^-1;
2. mask: SparseGPT's sweep on that weight, each group's mask chosen by the joint cost of what it prunes;
3. refit: the kept weights that minimise it, by conjugate gradients, all rows at once; in a dense segment
   every weight is kept.

Once each layer of a block is pruned, `calibration.pruning.block_finetune` lets the block's layers compensate for
each other; after the last block `calibration.pruning.lm_head_refit` lets the output head compensate for the rest.

The pruned and dense inputs in one target: Li et al., GPTAQ, 2025, arXiv:2504.02692. A refit on a fixed mask by
projected conjugate gradients: Meng et al., ALPS, NeurIPS 2024, arXiv:2406.07831.

Suffixes: N out_features, K in_features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.pruning.solvers.hessian import damped
from calibration.pruning.solvers.masks import Pattern, apply
from calibration.pruning.solvers.protocol import Solver, Statistics
from calibration.pruning.solvers.sparsegpt import prune_in_turn, prune_together, sweep_segments
from plugins.sparsity.segments import Segments

TOWARDS_DENSE = 0.5  # a
REFIT_STEPS = 20  # the tuning that follows makes up for the rest
TINY = 1e-30  # keeps a row that is solved already from dividing by zero
MOST_CHOICES = 70  # masks of a group that are tried one by one: as many as 4:8 has


class Reconstruct(Solver):
    """Raises UserError where the inputs are not finite."""

    needs_dense_inputs = True
    tunes_blocks = True
    refits_head = True

    def prune(
        self, name: str, weight_NK: Tensor, statistics: Statistics | None, pattern: Pattern, segments: Segments
    ) -> Tensor:
        """Accepts statistics without the dense model's part: the target is then the layer's own output."""
        assert statistics is not None
        upper_KK, damping = statistics.factor(name)
        hessian_KK = damped(statistics.hessian, damping)
        target_NK = _target(weight_NK, statistics, hessian_KK)

        wanted_NK = target_NK @ upper_KK.T @ upper_KK
        prune_group = prune_together if 0 < pattern.choices() <= MOST_CHOICES else prune_in_turn
        swept_NK, mask_NK = sweep_segments(name, wanted_NK, statistics, pattern, segments, prune_group)
        pruned_NK = refit(swept_NK * mask_NK, mask_NK, target_NK, hessian_KK, REFIT_STEPS)
        return apply(pruned_NK, mask_NK)


def _target(weight_NK: Tensor, statistics: Statistics, hessian_KK: Tensor) -> Tensor:
    """B [N, K]: the target outputs' moments with the inputs. The damping pulls the weight to its dense value."""
    target_NK = weight_NK @ hessian_KK
    if statistics.cross is not None:
        target_NK += TOWARDS_DENSE * (weight_NK @ (statistics.cross - statistics.hessian))
    elif statistics.residual_cross is not None:
        target_NK += TOWARDS_DENSE * (statistics.residual_cross - weight_NK @ statistics.hessian)
    return target_NK


def refit(weight_NK: Tensor, mask_NK: Tensor, target_NK: Tensor, hessian_KK: Tensor, steps: int) -> Tensor:
    """Minimises tr(V H V') - 2 tr(V B') over the V that are zero off the mask, from `weight_NK` on.

    Conjugate gradients with the Hessian's diagonal as preconditioner; each row has its own step.
    """
    diagonal_K = hessian_KK.diagonal()
    gradient_NK = (target_NK - weight_NK @ hessian_KK).mul_(mask_NK)
    scaled_NK = gradient_NK / diagonal_K
    direction_NK = scaled_NK.clone()
    slope_N1 = (gradient_NK * scaled_NK).sum(1, keepdim=True)
    weight_NK = weight_NK.clone()
    for _ in range(steps):
        curved_NK = (direction_NK @ hessian_KK).mul_(mask_NK)
        step_N1 = slope_N1 / (direction_NK * curved_NK).sum(1, keepdim=True).clamp_min(TINY)
        weight_NK.addcmul_(step_N1, direction_NK)
        gradient_NK.addcmul_(step_N1, curved_NK, value=-1)
        torch.div(gradient_NK, diagonal_K, out=scaled_NK)
        next_N1 = (gradient_NK * scaled_NK).sum(1, keepdim=True)
        direction_NK.mul_(next_N1 / slope_N1.clamp_min(TINY)).add_(scaled_NK)
        slope_N1 = next_N1
    return weight_NK
