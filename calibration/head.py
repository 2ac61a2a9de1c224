"""Refits the output head: what a linear map can take back of all the error that the pruned blocks leave.

The head stays dense and keeps its shape. With P [tokens, D] the hidden states, after the model's last norm, that the
pruned blocks give and F those of the dense model, A [D, D] is to minimise |P + PA - F|^2; a head W that reads P + PA is
the head W + WA' that reads P. So it is for each of its rows the least-squares fit of the dense logits.

Suffixes: T tokens of a sample, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.blocks import Blocks
from calibration.solvers.hessian import damped
from calibration.states import States
from calibration.walk import LayerReport, report

NAME = "lm_head"
DAMPING = 0.1  # of the mean of the diagonal of P'P: draws A towards 0 where the text says little
HELD_BACK = 8  # each how many samples one is held back, to see whether A does better on what it was not fitted to
ROWS = 4096  # of the head that change together


@dataclass
class _Moments:
    """Sums over samples: P'P [D, D], P'(F - P) [D, D] and |F - P|^2."""

    hessian: Tensor
    cross: Tensor
    distance: float = 0.0

    @classmethod
    def zeros(cls, size: int, device: torch.device | str) -> _Moments:
        return cls(torch.zeros(size, size, device=device), torch.zeros(size, size, device=device))

    def add(self, pruned_TD: Tensor, dense_TD: Tensor) -> None:
        missing_TD = dense_TD - pruned_TD
        self.hessian.addmm_(pruned_TD.T, pruned_TD)
        self.cross.addmm_(pruned_TD.T, missing_TD)
        self.distance += float(missing_TD.square().sum())

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(self.hessian + other.hessian, self.cross + other.cross, self.distance + other.distance)

    def fit(self) -> Tensor:
        """A [D, D]."""
        return torch.linalg.solve(damped(self.hessian, DAMPING), self.cross)

    def taken_back(self, map_DD: Tensor) -> float:
        """The share of the squared distance that A takes back on these samples; negative where it adds to it."""
        curved_DD = self.hessian @ map_DD - 2 * self.cross
        return -float((map_DD * curved_DD).sum()) / self.distance


def refit_head(blocks: Blocks, pruned: States, dense: States) -> tuple[LayerReport, Tensor]:
    """What became of the head, and its weight [V, D] as stored: as it was where no better one was found.

    The states are those that leave the last block.
    """
    weight_VD = blocks.weights.read(f"{NAME}.weight")
    fitted, held_back = _moments(blocks, pruned, dense)
    share = held_back.taken_back(fitted.fit()) if held_back.distance else 0.0
    if share <= 0:
        note = "not refitted, as that took nothing back on samples held back from the fit"
    else:
        note = f"refitted, which takes back {share:.1%} of the final hidden states' squared error on samples held back"
        map_DD = (fitted + held_back).fit()
        for rows_VD in weight_VD.split(ROWS):
            wide_VD = rows_VD.to(map_DD.device).float()
            rows_VD.copy_(torch.addmm(wide_VD, wide_VD, map_DD.T))
    return report(NAME, weight_VD, pruned=False, note=note), weight_VD


def _moments(blocks: Blocks, pruned: States, dense: States) -> tuple[_Moments, _Moments]:
    """Over the samples that are fitted to, and over those held back; both empty where there is one sample."""
    norm = blocks.load_norm()
    fitted, held_back = (_Moments.zeros(pruned.shape[-1], pruned.device) for _ in range(2))
    every = min(HELD_BACK, len(pruned))
    for sample in range(len(pruned) if every > 1 else 0):
        moments = held_back if sample % every == every - 1 else fitted
        moments.add(*(norm(states.read([sample]))[0] for states in (pruned, dense)))
    return fitted, held_back
