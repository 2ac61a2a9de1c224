"""Refits lm_head by least squares to compensate for the pruned blocks.

lm_head stays dense and keeps its shape. With P [tokens, D] the pruned model's hidden states after the last norm and F
the dense model's, A [D, D] minimizes |P + PA - F|^2. Then W' = W + WA' applied to P equals W applied to P + PA: each
row of lm_head is the least-squares fit of the dense logits.

Suffixes: B samples, T tokens of a sample, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from calibration.model.activation_file import ActivationFile
from calibration.model.blocks import HEAD, Blocks
from calibration.model.device import return_freed_memory
from calibration.pruning.block_pruner import LayerReport, Outcome, report
from calibration.pruning.solvers.hessian import damped

DAMPING = 0.1  # of the mean of the diagonal of P'P: draws A towards 0 where the text determines little
HELD_BACK = 8  # one sample in so many judges the head and is not fitted to
ROWS = 4096  # of the head that are in float32 together
TOKENS = 64  # whose logits are in memory together


def refit_head(blocks: Blocks, pruned: ActivationFile, dense: ActivationFile) -> tuple[LayerReport, Tensor]:
    """The outcome, and the head's weight [V, D] as stored: the old one where the new one is not better.

    `states` are the outputs of the last block. The criterion is the KL of the logits from the dense model's over the
    held-out samples.
    """
    return_freed_memory()
    old_VD, norm = blocks.weights.read(f"{HEAD}.weight").to(blocks.device), blocks.load_norm()
    held_back = range(0, len(pruned), HELD_BACK)
    fitted = [sample for sample in range(len(pruned)) if sample not in held_back]
    new_VD = _compose(_fit(_final(norm, pruned, dense, fitted), old_VD), old_VD)
    before, after = _divergences(old_VD, new_VD, _final(norm, pruned, dense, held_back))
    outcome, kept_VD = (Outcome.REFITTED, new_VD) if after < before else (Outcome.NOT_REFITTED, old_VD)
    note = f"KL from the dense model over held-out samples {before:.4f} -> {after:.4f} nats"
    return report(HEAD, kept_VD, pruned=False, outcome=outcome, note=note), kept_VD.cpu()


def _final(
    norm: nn.Module, pruned: ActivationFile, dense: ActivationFile, samples: Iterable[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """The final hidden states [T, D] of both models, sample by sample."""
    for sample in samples:
        yield norm(pruned.read([sample]))[0], norm(dense.read([sample]))[0]


def _fit(samples: Iterable[tuple[Tensor, Tensor]], head_VD: Tensor) -> Tensor:
    """A [D, D] for states that such a head reads; zero where there is no sample."""
    size = head_VD.shape[1]
    hessian_DD, cross_DD = (torch.zeros(size, size, device=head_VD.device) for _ in range(2))
    for pruned_TD, dense_TD in samples:
        hessian_DD.addmm_(pruned_TD.T, pruned_TD)
        cross_DD.addmm_(pruned_TD.T, dense_TD - pruned_TD)
    return torch.linalg.solve(damped(hessian_DD, DAMPING), cross_DD)


def _compose(map_DD: Tensor, head_VD: Tensor) -> Tensor:
    """The head that does what A added to the states and then this head do: W + WA', in the head's dtype."""
    new_VD = torch.empty_like(head_VD)
    for rows_VD, new_rows_VD in zip(head_VD.split(ROWS), new_VD.split(ROWS), strict=True):
        new_rows_VD.copy_(torch.addmm(rows_VD.float(), rows_VD.float(), map_DD.T))
    return new_VD


def _divergences(old_VD: Tensor, new_VD: Tensor, samples: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """The mean KL in nats from the dense model, which has the old head, to the pruned one with the old and the new."""
    sums, tokens = [0.0, 0.0], 0
    for pruned_TD, dense_TD in samples:
        for pruned_part_TD, dense_part_TD in zip(pruned_TD.split(TOKENS), dense_TD.split(TOKENS), strict=True):
            wanted_TV = _log_probabilities(dense_part_TD, old_VD)
            for which, head_VD in enumerate((old_VD, new_VD)):
                given_TV = _log_probabilities(pruned_part_TD, head_VD)
                sums[which] += float(nn.functional.kl_div(given_TV, wanted_TV, reduction="sum", log_target=True))
        tokens += len(pruned_TD)
    return sums[0] / tokens, sums[1] / tokens


def _log_probabilities(hidden_TD: Tensor, head_VD: Tensor) -> Tensor:
    """[T, V] float32; the product is in the head's dtype, as in use."""
    return (hidden_TD.to(head_VD.dtype) @ head_VD.T).float().log_softmax(-1)
