"""Pruning methods, one a file, by the name that a recipe gives them."""

from calibration.solvers.magnitude import Magnitude
from calibration.solvers.masks import Pattern
from calibration.solvers.protocol import Solver, Statistics
from calibration.solvers.reconstruct import Reconstruct
from calibration.solvers.sparsegpt import SparseGPT
from calibration.solvers.wanda import Wanda

SOLVERS: dict[str, type[Solver]] = {
    "reconstruct": Reconstruct,
    "sparsegpt": SparseGPT,
    "wanda": Wanda,
    "magnitude": Magnitude,
}

__all__ = ["SOLVERS", "Pattern", "Solver", "Statistics"]
