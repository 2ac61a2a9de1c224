"""The layer's Hessian made fit to solve with: finite, damped, inverted.

Suffix: K in_features.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from plugins.common.errors import UserError

log = logging.getLogger(__name__)

DAMPING = 0.01  # of the mean of the Hessian's diagonal, as SparseGPT and GPTQ have it
STEP = 10.0  # by which the damping grows while the Hessian cannot be factored


def check_finite(name: str, hessian_KK: Tensor) -> None:
    """Raises UserError where the layer's inputs held an infinity or not-a-number."""
    if not torch.isfinite(hessian_KK).all():
        raise UserError(
            f"the inputs of '{name}' are not finite over the calibration text: "
            "check the model's weights for NaN and its text for tokens that overflow"
        )


def damped(hessian_KK: Tensor, damping: float = DAMPING) -> Tensor:
    """A copy with `damping` times the diagonal's mean added to the diagonal; the identity if the Hessian is zero."""
    size = float(hessian_KK.diagonal().abs().mean())
    copy = hessian_KK.clone()
    copy.diagonal().add_(damping * size if size > 0 else 1.0)
    return copy


def inverse_factor(name: str, hessian_KK: Tensor, damping: float = DAMPING) -> tuple[Tensor, float]:
    """The upper triangular U [K, K] with U'U = (H + damping)^-1, and the damping.

    Where H is so near singular that it cannot be factored, the damping is raised tenfold at a time, with a warning that
    names the layer. Raises UserError where H is not finite.
    """
    check_finite(name, hessian_KK)
    first = damping
    while True:
        # H = R R' with R upper triangular is the Cholesky factor of H with both axes reversed; U is then R^-1.
        factor, failed = torch.linalg.cholesky_ex(damped(hessian_KK, damping).flip(0, 1))
        if not failed and bool(torch.isfinite(factor).all()):
            break
        damping *= STEP
    if damping != first:
        log.warning(f"the Hessian of '{name}' is singular: its damping was raised from {first:g} to {damping:g}")
    upper_KK = factor.flip(0, 1)
    del factor  # at 8192 inputs each of these is 268 MB
    inverse_KK = torch.eye(len(upper_KK), dtype=upper_KK.dtype, device=upper_KK.device).T  # columns side by side
    return torch.linalg.solve_triangular(upper_KK, inverse_KK, upper=True, out=inverse_KK), damping
