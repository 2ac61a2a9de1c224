"""Causal attention of prompts in libtwofour_cpu against float64: no further from it than torch's own bfloat16."""

from __future__ import annotations

import pytest
import torch

from builder.engines.torch_backend import cpu_attention
from builder.engines.torch_backend.attention import _causal
from plugins.common.errors import UserError
from plugins.libtwofour import cpu

pytestmark = pytest.mark.skipif(not cpu.has_bf16(), reason="this processor has no AVX512-BF16")

SHAPES = {  # requests, heads, key-value heads, new tokens, positions seen, head_dim, window
    "whole": (2, 6, 2, 70, 70, 64, None),
    "one block": (1, 2, 1, 16, 16, 32, None),
    "continued": (1, 4, 4, 33, 130, 96, None),
    "window": (1, 4, 1, 90, 90, 64, 17),
    "window over what was seen": (3, 2, 2, 20, 300, 128, 40),
    "window beyond the sequence": (1, 2, 2, 31, 31, 64, 100),
}


def tensors(shape, scale=1.0):
    requests, heads, kv_heads, new, seen, head_dim, window = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((requests, new, heads, head_dim), *[(requests, seen, kv_heads, head_dim)] * 2)
    q, k, v = (scale * torch.randn(size, generator=generator) for size in sizes)
    return *(x.bfloat16().transpose(1, 2) for x in (q, k, v)), window


def reference(q, k, v, window):
    k, v = (x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    new, seen = q.shape[2], k.shape[2]
    position, key = torch.arange(seen - new, seen)[:, None], torch.arange(seen)
    hidden = (key > position) | (key <= position - (window or seen))
    scores = (q.double() @ k.transpose(2, 3) * 0.125).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("name", SHAPES)
def test_it_is_as_close_to_float64_as_torch(name, monkeypatch):
    q, k, v, window = tensors(SHAPES[name])
    assert cpu_attention.is_usable(q, k, v)
    ours = _causal(q, k, v, (1.0, 1.0), 0.125, window)
    monkeypatch.setattr(cpu_attention, "FEWEST", 1000)
    torch_own = _causal(q, k, v, (1.0, 1.0), 0.125, window)
    expected = reference(q, k, v, window)
    assert (ours - expected).abs().max() <= 1.5 * (torch_own - expected).abs().max() + 1e-3


def test_scores_far_apart_leave_no_nan():
    q, k, v, window = tensors(SHAPES["whole"], scale=300.0)
    ours = _causal(q, k, v, (1.0, 1.0), 0.125, window)
    assert bool(torch.isfinite(ours).all())


def test_scales_of_the_cache_are_applied():
    q, k, v, _ = tensors(SHAPES["continued"])
    plain = cpu_attention.attend(q, k, v, 0.25, 1.0, None)
    scaled = cpu_attention.attend(q, k, v, 0.25, 2.0, None)
    assert torch.equal(scaled, 2 * plain)


def test_few_tokens_and_other_types_stay_with_torch():
    q, k, v, _ = tensors((1, 2, 2, cpu_attention.FEWEST - 1, 40, 64, None))
    assert not cpu_attention.is_usable(q, k, v)
    q, k, v, _ = tensors(SHAPES["whole"])
    assert not cpu_attention.is_usable(q.float(), k.float(), v.float())


def test_heads_of_another_size_are_refused():
    q, k, v, _ = tensors((1, 2, 2, 20, 20, 48, None))
    with pytest.raises(UserError, match="heads of size 48"):
        cpu_attention.attend(q, k, v, 1.0, 1.0, None)
