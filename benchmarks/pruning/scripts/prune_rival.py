"""python -m benchmarks.pruning.scripts.prune_rival METHOD MODEL TOKENS LAYERS OUT METER

Prunes as other work does, in METHOD:

    6:8, 25%          sequential SparseGPT with this pattern (n:m, or a share anywhere) in all layers
    blocks SHARE      drops the blocks that change their input least, this share of the blocks' weights (Men et al.,
                      ShortGPT, 2024, arXiv 2403.03853)
    channels SHARE    drops the MLP channels of least norm after the activation, this share of the blocks' weights, and
                      refits down_proj to the channels left by least squares

What is dropped is zeroed, which computes the same. METER gets the share of the blocks' weights that is left out.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibration.config import Sparsity
from calibration.pruning.sparsify import sparsify
from plugins.common.progress import silent
from plugins.sparsity.declaration import Declaration

BATCH = 8  # windows
DAMPING = 0.01  # of the mean diagonal, as SparseGPT's


def main(method: str, source: str, tokens: str, layers: str, out: str, metered: str) -> None:
    kind, _, share = method.partition(" ")
    ids = np.load(tokens)
    if kind not in ("blocks", "channels"):
        target = Declaration(tuple(json.loads(layers)), pattern=kind)  # type: ignore[arg-type]  # also no recipe's
        sparsify(Path(source), ids, Sparsity(method="sparsegpt"), target, Path(out), Path(f"{out}.work"), silent)
        left_out = None
    else:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        dtype = AutoModelForCausalLM.from_pretrained(source, dtype="auto").dtype
        drop = drop_blocks if kind == "blocks" else drop_channels
        with torch.inference_mode():
            left_out = drop(model, torch.from_numpy(ids).split(BATCH), float(share))
        model.to(dtype).save_pretrained(out)
        AutoTokenizer.from_pretrained(source).save_pretrained(out)
    Path(metered).write_text(json.dumps({"left_out": left_out}))


def drop_blocks(model: nn.Module, batches: tuple[Tensor, ...], share: float) -> float:
    """Zeroes what the least influential blocks add to the stream."""
    blocks = model.model.layers
    change_B = torch.zeros(len(blocks))
    for batch in batches:
        hidden = model(batch, output_hidden_states=True, use_cache=False).hidden_states
        for number in range(len(blocks) - 1):  # the last hidden state is normed
            cosine = nn.functional.cosine_similarity(hidden[number], hidden[number + 1], dim=-1)
            change_B[number] += (1 - cosine).mean()
    change_B[-1] = torch.inf
    dropped = change_B.argsort()[: round(share * len(blocks))].tolist()
    for number in dropped:
        for projection in (blocks[number].self_attn.o_proj, blocks[number].mlp.down_proj):
            projection.weight.zero_()
    return len(dropped) / len(blocks)


def drop_channels(model: nn.Module, batches: tuple[Tensor, ...], share: float) -> float:
    """Zeroes the same number of MLP channels in each block: the rows of gate and up, the columns of down."""
    downs = [block.mlp.down_proj for block in model.model.layers]
    moments = {down: torch.zeros(down.in_features, down.in_features) for down in downs}
    for down in downs:
        down.register_forward_pre_hook(lambda module, inputs: _add(moments[module], inputs[0]))
    for batch in batches:
        model(batch, use_cache=False)
    block = model.model.layers[0]
    weights = sum(module.weight.numel() for module in block.modules() if isinstance(module, nn.Linear))
    channel = 2 * block.mlp.gate_proj.in_features + downs[0].out_features  # weights of one
    count = round(share * weights / channel)
    for down in downs:
        moment_KK = moments[down]
        score_K = moment_KK.diagonal().sqrt() * down.weight.norm(dim=0)
        kept = score_K.argsort(descending=True)[: down.in_features - count].sort().values
        kept_moment = moment_KK[kept][:, kept]
        kept_moment += DAMPING * kept_moment.diagonal().mean() * torch.eye(len(kept))
        refitted = torch.linalg.solve(kept_moment, moment_KK[kept] @ down.weight.T).T
        down.weight.zero_()
        down.weight[:, kept] = refitted
    return float(count * channel / weights)


def _add(moment_KK: Tensor, x_BTK: Tensor) -> None:
    flat_MK = x_BTK.flatten(0, 1)
    moment_KK += flat_MK.T @ flat_MK


if __name__ == "__main__":
    main(*sys.argv[1:])
