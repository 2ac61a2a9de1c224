"""The best low-rank approximation of a layer's error, weighed by the inputs that the layer has.

EoRA: Liu et al., 2024, arXiv:2410.21271. Suffixes: N out_features, K in_features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.pruning.solvers.hessian import check_finite, damped


def low_rank(name: str, error_NK: Tensor, hessian_KK: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [N, R] and A [R, K] with the least `output_error` of E - B A, for inputs X with H = X'X.

    `rank` is at most min(N, K). Raises UserError where H is not finite.

    With S S' = H and U_R s_R V_R' the best approximation of E S, EoRA's B A = U_R s_R V_R' S^-1 is U_R U_R' E. So
    B = U_R and A = U_R' E: no inverse is needed, and both keep within the range of 16-bit numbers. H is damped as the
    solvers damp it, so that inputs that the text does not show count a little too.
    """
    check_finite(name, hessian_KK)
    out_features, in_features = error_NK.shape
    damped_KK = damped(hessian_KK)
    if out_features <= in_features:  # the smaller of two matrices is decomposed: U diagonalises E S (E S)' = E H E'
        u_NR = _largest(error_NK @ damped_KK @ error_NK.T, rank)
    else:
        eigenvalues_K, q_KK = torch.linalg.eigh(damped_KK)
        es_NK = error_NK @ (q_KK * eigenvalues_K.clamp_min(0).sqrt())  # with S = Q sqrt(L)
        u_NR = torch.linalg.qr(es_NK @ _largest(es_NK.T @ es_NK, rank)).Q
    return u_NR, u_NR.T @ error_NK


def output_error(error_NK: Tensor, hessian_KK: Tensor) -> float:
    """The squared change |X E'|^2 of the outputs by an error E of the weight, for inputs X with H = X'X."""
    return float((error_NK @ hessian_KK * error_NK).sum(dtype=torch.float64))


def _largest(symmetric: Tensor, rank: int) -> Tensor:
    """The eigenvectors [_, R] of the largest eigenvalues."""
    return torch.linalg.eigh(symmetric).eigenvectors[:, -rank:]
