"""Text that the dense model writes itself: training data drawn from the very distribution that a student should learn.

Liu et al., 2023 (arXiv 2305.17888) distill from self-generated text where the training data is closed or small.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from calibration.data.windows import Tokens
from plugins.common.progress import Progress

BATCH = 64  # windows sampled together
PROMPT = 4  # tokens of real text that a window begins with


@torch.inference_mode()
def sample(model: Any, tokens: Tokens, windows: int, seed: int, progress: Progress) -> Tokens:
    """`windows` windows [windows, T] like `tokens` [_, T]: one of them, continued at temperature 1.

    Deterministic for a seed on one machine. No end-of-sequence stops it, as windows of running text have none.
    """
    rng, length = np.random.default_rng(seed), tokens.shape[1]
    begins = tokens[rng.integers(len(tokens), size=windows), :PROMPT]
    sequences = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, windows, BATCH):
            sequences.append(_continue(model, begins[start : start + BATCH], length))
            progress("sample", min(start + BATCH, windows), windows)
    return np.concatenate(sequences) if sequences else tokens[:0]


def _continue(model: Any, begins: Tokens, length: int) -> Tokens:
    ids_BT = torch.from_numpy(np.ascontiguousarray(begins)).to(model.device)
    drawn, cache = ids_BT, None
    while drawn.shape[1] and ids_BT.shape[1] < length:
        output = model(drawn, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        drawn = output.logits[:, -1].float().softmax(-1).multinomial(1)
        ids_BT = torch.cat([ids_BT, drawn], dim=1)
    continued: Tokens = ids_BT[:, :length].cpu().numpy()
    return continued
