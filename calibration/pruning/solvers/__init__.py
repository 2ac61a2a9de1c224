"""Pruning methods, one a file, by the name that a recipe gives them."""

from calibration.pruning.solvers.magnitude import Magnitude
from calibration.pruning.solvers.masks import Pattern
from calibration.pruning.solvers.protocol import Solver, Statistics
from calibration.pruning.solvers.reconstruct import Reconstruct
from calibration.pruning.solvers.sparsegpt import SparseGPT
from calibration.pruning.solvers.wanda import Wanda

SOLVERS: dict[str, type[Solver]] = {
    "reconstruct": Reconstruct,
    "sparsegpt": SparseGPT,
    "wanda": Wanda,
    "magnitude": Magnitude,
}

__all__ = ["SOLVERS", "Pattern", "Solver", "Statistics"]
