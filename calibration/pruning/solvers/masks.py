"""Which weights stay: n of each group of m inputs, or a share of all of them.

Suffixes: N out_features, K in_features.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from plugins.common.errors import UserError
from plugins.sparsity.segments import Segments


@dataclass(frozen=True)
class Pattern:
    """`keep` of each aligned group of `group` inputs stay; with `group` 0, the share `keep` of a matrix stays."""

    keep: float
    group: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Reads "2:4" (n:m) or "50%" (this share is pruned, anywhere). Raises UserError."""
        if match := re.fullmatch(r"(\d+):(\d+)", text):
            keep, group = map(int, match.groups())
            if 0 < keep < group:
                return cls(keep, group)
        elif (match := re.fullmatch(r"(\d+(?:\.\d+)?)%", text)) and 0 < float(match[1]) < 100:
            return cls(1 - float(match[1]) / 100, 0)
        raise UserError(
            f"'{text}' is not a sparsity pattern: write 2:4, another n:m with n < m, or a share such as 50%"
        )

    def __str__(self) -> str:
        return f"{int(self.keep)}:{self.group}" if self.group else f"{1 - self.keep:.3g} unstructured"

    def choices(self) -> int:
        """How many masks one group can have; 0 where there are no groups."""
        return math.comb(self.group, int(self.keep)) if self.group else 0

    def fits(self, in_features: int) -> bool:
        """Whether rows of `in_features` divide into whole groups."""
        return self.group == 0 or in_features % self.group == 0

    def select(self, score_NK: Tensor) -> Tensor:
        """The mask [N, K] (bool, true stays) that keeps the highest scores; of equal scores the first."""
        if self.group == 0:
            kept = round(self.keep * score_NK.numel())
            order = score_NK.flatten().argsort(descending=True, stable=True)
            mask = torch.zeros(score_NK.numel(), dtype=torch.bool, device=score_NK.device)
            mask[order[:kept]] = True
            return mask.view_as(score_NK)
        groups = score_NK.unflatten(1, (-1, self.group))
        order = groups.argsort(dim=2, descending=True, stable=True)[..., : int(self.keep)]
        mask = torch.zeros(groups.shape, dtype=torch.bool, device=score_NK.device)
        return mask.scatter_(2, order, True).flatten(1)

    def holds(self, weight_NK: Tensor) -> bool:
        """Whether the weight is sparse in this pattern already."""
        if self.group == 0:
            return bool(weight_NK.count_nonzero() <= round(self.keep * weight_NK.numel()))
        if not self.fits(weight_NK.shape[1]):
            return False
        return bool((weight_NK.unflatten(1, (-1, self.group)) != 0).sum(2).max() <= self.keep)


def dense_part(weight_NK: Tensor, segments: Segments) -> Tensor:
    """Where the weight is dense: a mask [N, 1] or [1, K] that broadcasts to it."""
    along = torch.zeros(weight_NK.shape[segments.axis == "inputs"], dtype=torch.bool, device=weight_NK.device)
    for part in segments.dense:
        along[part.slice] = True
    return along[:, None] if segments.axis == "rows" else along


def sparse_part(weight_NK: Tensor, segments: Segments) -> Tensor:
    """The rows or inputs that are in the pattern, side by side."""
    axis = int(segments.axis == "inputs")
    return weight_NK.index_select(axis, torch.from_numpy(segments.indices(segments.sparse)).to(weight_NK.device))


def apply(weight_NK: Tensor, mask_NK: Tensor) -> Tensor:
    """The weight with +0 wherever the mask is false or the weight is -0: sparse kernels take -0 for a value."""
    return torch.where(mask_NK & (weight_NK != 0), weight_NK, 0)
