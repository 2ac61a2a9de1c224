"""Loss and memory of eviction from the KV cache, at several lengths and budgets:

    python -m builder.engines.torch_backend.eviction_benchmark MODEL

Texts: the beginning of the Python language documentation and of the argparse source, from the running Python. The loss
is the mean negative log-likelihood (nats) of the tokens after the largest budget, the same tokens for every budget,
each conditioned on the cache contents of decoding. Memory is that of the blocks that a request occupies after a prompt
of that length in a serving engine, without the attention mass (4 bytes per layer, head and token); the time of a decode
step is the median over tokens.
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.environment import describe
from benchmarks.pruning.accuracy import RESULTS, write_result
from builder.engines.torch_backend import artifact
from builder.engines.torch_backend.artifact import TorchEngine
from builder.planning.kv_capacity import BLOCK
from plugins.common.request import Request

BUDGETS = (None, 1024, 512, 256)  # tokens; None keeps all
NEW_TOKENS = 24


def texts() -> dict[str, str]:
    """The prompts by name."""
    return {
        "documentation": "\n\n".join(pydoc_data.topics.topics.values()),
        "source code": Path(argparse.__file__).read_text(encoding="utf8"),
    }


def mean_loss(engine: TorchEngine, ids_T: torch.Tensor, first: int) -> float:
    """Mean negative log-likelihood of the tokens from `first` on, in nats."""
    logits_TV = engine.logits(ids_T[None])[0, first - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits_TV, ids_T[first:].to(logits_TV.device)))


def serve(engine: TorchEngine, ids_T: torch.Tensor) -> dict[str, float]:
    """Bytes that the request holds after its prompt, and the median time of a decode step in ms."""
    facts = engine.describe()
    block_bytes = facts["kv_cache_bytes"] * BLOCK / facts["kv_cache_tokens"]
    engine.add(Request("a", tuple(ids_T.tolist()), NEW_TOKENS, ignore_eos=True))
    times, blocks = [], []
    while engine.busy:
        times += [token.time for token in engine.step()]
        blocks.append(engine.describe()["kv_cache_blocks_used"])
    steps = [later - earlier for earlier, later in pairwise(times[1:])]
    return {"kv_bytes": round(blocks[1] * block_bytes), "decode_ms": 1e3 * statistics.median(steps)}


def measure(model: Path, lengths: list[int]) -> list[dict[str, Any]]:
    """A row for each text, length and budget."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    longest, rows = max(lengths), []
    tokens = {name: torch.tensor(tokenizer(text)["input_ids"][:longest]) for name, text in texts().items()}
    for budget in BUDGETS:
        engine = artifact.load_hf(
            model, max_batch_size=1, max_seq_len=longest, kv_cache_budget=budget, kv_cache_block_reuse=False
        )
        for length in lengths:
            for name, ids in tokens.items():
                loss = mean_loss(engine, ids[:length], max(filter(None, BUDGETS)))
                row = {"text": name, "tokens": length, "budget": budget, "loss": loss}
                rows.append(row | serve(engine, ids[: length - NEW_TOKENS]))
                print(_line(rows[-1]), flush=True)
    return rows


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['text']:14}{row['tokens']:6} tokens, budget {row['budget'] or 'none':>5}: loss {row['loss']:.4f}, "
        f"{row['kv_bytes'] / 2**20:7.1f} MiB, {row['decode_ms']:6.1f} ms a decode step"
    )


def main() -> None:
    """Prints a line for each text, length and budget, and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with torch.inference_mode():
        rows = measure(arguments.model, arguments.lengths)
    settings = {"model": arguments.model.name, "dtype": str(artifact.load_hf(arguments.model).model.dtype)}
    print(write_result("kv_eviction", {"environment": describe(), "settings": settings, "rows": rows}, arguments.out))


if __name__ == "__main__":
    main()
