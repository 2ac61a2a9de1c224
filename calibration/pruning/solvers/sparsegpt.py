"""SparseGPT: prunes a layer from its first input to its last, and lets the inputs to come make up for each loss.

Frantar and Alistarh, ICML 2023, arXiv:2301.00774, algorithm 1.

The weight is held transposed, so that one input's weights lie side by side in memory, and updates are put off: within
a group at once, within a panel once a group, beyond it once a panel. All but the updates inside a group are then matrix
products.

Of a hybrid layer the dense rows stay as they are, and the dense inputs come last, so that they make up for most.

Suffixes: N out_features, K in_features, G inputs of a group, P of a panel, E the pruned of a group, C choices of E.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from calibration.pruning.solvers.masks import Pattern, apply
from calibration.pruning.solvers.protocol import Solver, Statistics
from plugins.sparsity.segments import Segments

PANEL = 128
Prune = Callable[[Tensor, Tensor, Pattern], tuple[Tensor, Tensor]]


class SparseGPT(Solver):
    """The mask by |w| over the inverse Hessian's diagonal, the other weights updated."""

    def prune(
        self, name: str, weight_NK: Tensor, statistics: Statistics | None, pattern: Pattern, segments: Segments
    ) -> Tensor:
        """Raises UserError where the inputs are not finite."""
        assert statistics is not None
        swept_NK, mask_NK = sweep_segments(name, weight_NK, statistics, pattern, segments, prune_in_turn)
        return apply(swept_NK, mask_NK)


def sweep_segments(
    name: str, weight_NK: Tensor, statistics: Statistics, pattern: Pattern, segments: Segments, prune_group: Prune
) -> tuple[Tensor, Tensor]:
    """The swept weight and its mask, both [N, K]: sparse segments pruned, dense rows untouched, dense inputs last."""
    sparse, dense = (
        torch.from_numpy(segments.indices(parts)).to(weight_NK.device) for parts in (segments.sparse, segments.dense)
    )
    mask_NK = torch.ones_like(weight_NK, dtype=torch.bool)
    swept_NK = weight_NK.clone()
    if segments.axis == "rows":
        weight_KN = weight_NK[sparse].T.contiguous()
        mask_KN = sweep(weight_KN, statistics.factor(name)[0], pattern, prune_group)
        swept_NK[sparse], mask_NK[sparse] = weight_KN.T, mask_KN.T
        return swept_NK, mask_NK
    order_K = torch.cat([sparse, dense])
    if not torch.equal(order_K, torch.arange(len(order_K), device=order_K.device)):  # ranks have their shares of both
        statistics = statistics.reorder(order_K)
    weight_KN = weight_NK.T[order_K].contiguous()
    mask_KN = sweep(weight_KN, statistics.factor(name)[0], pattern, prune_group, until=len(sparse))
    swept_NK[:, order_K], mask_NK[:, order_K] = weight_KN.T, mask_KN.T
    return swept_NK, mask_NK


def sweep(
    weight_KN: Tensor, upper_KK: Tensor, pattern: Pattern, prune_group: Prune, until: int | None = None
) -> Tensor:
    """Prunes `weight_KN` in place, group by group; returns the mask [K, N] (bool, true stays).

    `upper_KK` is the factor U of the inverse Hessian, U'U. Inputs from `until` on are not pruned.
    """
    mask_KN = torch.ones_like(weight_KN, dtype=torch.bool)
    size = pattern.group or PANEL
    panel = max(1, PANEL // size) * size
    until = len(weight_KN) if until is None else until
    for start in range(0, until, panel):
        end = min(start + panel, until)
        error_PN = torch.empty_like(weight_KN[start:end])
        for at in range(start, end, size):
            to = min(at + size, end)
            mask_KN[at:to], error_GN = prune_group(weight_KN[at:to], upper_KK[at:to, at:to], pattern)
            error_PN[at - start : to - start] = error_GN
            weight_KN[to:end].addmm_(upper_KK[at:to, to:end].T, error_GN, alpha=-1)
        weight_KN[end:].addmm_(upper_KK[start:end, end:].T, error_PN, alpha=-1)
    return mask_KN


def prune_in_turn(weight_GN: Tensor, upper_GG: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """As published: inputs scored one by one before the group is touched, then pruned in their order.

    Updates the group's weights in place; returns the mask and the scaled error that later inputs make up for.
    """
    mask_GN = pattern.select((weight_GN / upper_GG.diagonal()[:, None]).abs().T).T
    error_GN = torch.empty_like(weight_GN)
    for j in range(len(weight_GN)):
        error_GN[j] = weight_GN[j] * ~mask_GN[j] / upper_GG[j, j]
        weight_GN[j:].addr_(upper_GG[j, j:], error_GN[j], alpha=-1)
    return mask_GN, error_GN


def prune_together(weight_GN: Tensor, upper_GG: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Tries every choice of pruned inputs of an n:m group and takes the one that costs least, all else made up for.

    Pruning the inputs E of the group costs w_E' (Q_EE)^-1 w_E, where Q is the inverse Hessian of the inputs still free:
    of these, U'U within the group. Kurtic et al., The Optimal BERT Surgeon, EMNLP 2022, arXiv:2203.07259, section 3.2.
    """
    choices = torch.tensor(
        list(combinations(range(pattern.group), pattern.group - int(pattern.keep))), device=weight_GN.device
    )
    inverse_GG = upper_GG.T @ upper_GG
    chosen_CEE = inverse_GG[choices[:, :, None], choices[:, None, :]]
    weight_CEN = weight_GN[choices]
    price_CEN = torch.linalg.inv(chosen_CEE) @ weight_CEN
    best_N = (price_CEN * weight_CEN).sum(1).argmin(0)
    pruned_EN = choices[best_N].T
    price_EN = price_CEN.gather(0, best_N.expand(1, len(pruned_EN), -1))[0]
    error_GN = upper_GG @ torch.zeros_like(weight_GN).scatter_(0, pruned_EN, price_EN)
    weight_GN.addmm_(upper_GG.T, error_GN, alpha=-1)
    return torch.ones_like(weight_GN, dtype=torch.bool).scatter_(0, pruned_EN, False), error_GN
