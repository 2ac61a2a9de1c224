"""Greedy answers of a build's engine against those of its checkpoint in transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from builder.engines.torch_backend import artifact
from plugins.common.request import Request


def check_greedy_tokens(out: Path) -> None:
    """Asserts that the engine in float32 gives transformers' 32 tokens after one prompt."""
    prompt = tuple(range(20, 52))
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint", dtype=torch.float32).eval()
    engine = artifact.load(out / "engine", dtype=torch.float32)
    answer = model.generate(torch.tensor([prompt]), max_new_tokens=32, min_new_tokens=32, do_sample=False)
    ours = [token.token for token in engine.generate([Request("0", prompt, 32, ignore_eos=True)])]
    assert ours == answer[0, len(prompt) :].tolist()
