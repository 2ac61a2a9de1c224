"""ModelOpt's side of sparsity: its own pruning methods, and our masks as its sparse state.

ModelOpt holds the whole model, and for SparseGPT every layer's Hessian, at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from calibration.model.loading import load_causal_lm
from calibration.model.silence import suppress_output
from plugins.common.progress import Progress

MODES = {"modelopt-magnitude": "sparse_magnitude", "modelopt-sparsegpt": "sparsegpt"}
SAMPLES_AT_ONCE = 8


def prune(source: Path, tokens_BT: Tensor, method: str, layers: Sequence[str], progress: Progress) -> dict[str, Tensor]:
    """The weights of `layers` as ModelOpt prunes them to 2:4, by layer, in the source's dtype.

    ModelOpt's SparseGPT uses its update to choose the mask and then discards it: kept weights stay as they were.
    """
    import modelopt.torch.sparsity as mts

    batches = tokens_BT.split(SAMPLES_AT_ONCE)

    def forward(model: nn.Module) -> None:
        for number, batch in enumerate(batches, start=1):
            model(batch, use_cache=False)
            progress("sparsify", number, len(batches))

    with suppress_output(), torch.no_grad():
        model = load_causal_lm(source)
        search = {"forward_loop": forward, "device": "cpu"} if method == "modelopt-sparsegpt" else {}
        model = mts.export(mts.sparsify(model, [(MODES[method], {"nn.Linear": _only(layers)})], search))
    return {name: model.get_submodule(name).weight + 0.0 for name in layers}


def apply_modelopt_masks(model: nn.Module, layers: Sequence[str]) -> nn.Module:
    """Gives ModelOpt the zeros of `layers` as masks of its sparse state, in place.

    From then on ModelOpt keeps them through training, distillation and saving; fold them with
    `modelopt.torch.sparsity.export` before quantizing.
    """
    from modelopt.torch.opt.conversion import apply_mode
    from modelopt.torch.sparsity.weight_sparsity.mode import SparsityModeRegistry

    masks = {name: model.get_submodule(name).weight != 0 for name in layers}
    with suppress_output():
        model = apply_mode(model, [("sparse_magnitude", {"nn.Linear": _only(layers)})], registry=SparsityModeRegistry)
    for name, mask in masks.items():
        model.get_submodule(name).set_mask(mask)
    return model


def _only(layers: Sequence[str]) -> dict[str, dict[str, str] | None]:
    """ModelOpt's rules for exactly these linear layers; later ones win."""
    return {"*": None, **{name: {} for name in layers}}
