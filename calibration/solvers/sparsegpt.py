"""SparseGPT: prunes a layer from its first input to its last, and lets the inputs to come make up for each loss.

Frantar and Alistarh, ICML 2023, arXiv:2301.00774, algorithm 1.

The weight is held transposed, so that one input's weights lie side by side in memory, and updates are put off: within a
group at once, within a panel once a group, beyond it once a panel. All but the updates inside a group are then matrix
products. Suffixes: N out_features, K in_features, G inputs of a group, P inputs of a panel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.solvers.hessian import inverse_factor
from calibration.solvers.masks import Pattern, apply
from calibration.solvers.protocol import Statistics

PANEL = 128


class SparseGPT:
    """The mask by |w| over the inverse Hessian's diagonal, the other weights updated."""

    needs_inputs = True
    needs_dense_inputs = False

    def prune(self, name: str, weight_NK: Tensor, statistics: Statistics | None, pattern: Pattern) -> Tensor:
        """Raises UserError where the inputs are not finite."""
        assert statistics is not None
        upper_KK = inverse_factor(name, statistics.hessian)
        weight_KN = weight_NK.T.contiguous()
        mask_KN = sweep(weight_KN, upper_KK, pattern)
        return apply(weight_KN, mask_KN).T.contiguous()


def sweep(weight_KN: Tensor, upper_KK: Tensor, pattern: Pattern) -> Tensor:
    """Prunes `weight_KN` in place, input by input; returns the mask [K, N] (bool, true stays)."""
    mask_KN = torch.empty_like(weight_KN, dtype=torch.bool)
    size = pattern.group or PANEL
    panel = max(1, PANEL // size) * size
    for start in range(0, len(weight_KN), panel):
        end = min(start + panel, len(weight_KN))
        error_PN = torch.empty_like(weight_KN[start:end])
        for at in range(start, end, size):
            to = min(at + size, end)
            scale_G1 = upper_KK.diagonal()[at:to, None]
            mask_KN[at:to] = pattern.select((weight_KN[at:to] / scale_G1).abs().T).T
            for j in range(at, to):
                error_N = weight_KN[j] * ~mask_KN[j] / upper_KK[j, j]
                error_PN[j - start] = error_N
                weight_KN[j:to].addr_(upper_KK[j, j:to], error_N, alpha=-1)
            weight_KN[to:end].addmm_(upper_KK[at:to, to:end].T, error_PN[at - start : to - start], alpha=-1)
        weight_KN[end:].addmm_(upper_KK[start:end, end:].T, error_PN, alpha=-1)
    return mask_KN
