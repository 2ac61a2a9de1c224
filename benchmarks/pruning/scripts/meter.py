"""Seconds and memory of a stretch of a process (Linux)."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path


def status_bytes(key: str) -> int:
    """A figure of /proc/self/status, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def load_code(model: str) -> None:
    """Loads what libraries load at first use, their code and buffers of fixed size: they are not a method's own need.

    A model of the same family with one block of 64 channels goes forward and backward in each type that a method uses.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 64}
    sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1}
    config = AutoConfig.from_pretrained(model, **sizes, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    ids = torch.zeros(2, 256, dtype=torch.long)
    for weights, products in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        small = AutoModelForCausalLM.from_config(config, dtype=weights)
        with torch.autocast("cpu", torch.bfloat16, enabled=products):
            small(ids).logits.float().sum().backward()
    torch.optim.Adam(small.parameters(), fused=True).step()
    torch.cholesky_inverse(torch.linalg.cholesky(torch.eye(512)))


@contextmanager
def meter(out: str, packages: list[str]) -> Iterator[None]:
    """Writes `out`: seconds, and the peak of resident memory, absolute and above what was resident at the start."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started = status_bytes("VmRSS"), time.perf_counter()
    yield
    seconds, peak = time.perf_counter() - started, status_bytes("VmHWM")
    measured = {"seconds": seconds, "peak_bytes": peak, "peak_above_start_bytes": peak - before}
    Path(out).write_text(json.dumps({**measured, "versions": {name: version(name) for name in packages}}))
