"""The rivals: what each script leaves out, on a model small enough to check by hand."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.pruning.accuracy import linear_layers, run_script
from benchmarks.pruning.scripts.prune_rival import drop_blocks, drop_channels
from calibration.pruning.solvers.masks import Pattern
from calibration.quantization.quantize import load_model
from tests.support.models import random_model


def batches() -> tuple[torch.Tensor, ...]:
    return torch.from_numpy(np.random.default_rng(0).integers(5, 100, (8, 16))).split(4)


@pytest.fixture
def model(tmp_path):
    return load_model(random_model(tmp_path / "model", "Llama")).float()


@torch.no_grad()
def test_a_block_that_adds_nothing_goes_first(model):
    idle = model.model.layers[0]
    for projection in (idle.self_attn.o_proj, idle.mlp.down_proj):
        projection.weight.mul_(1e-3)
    before = model(batches()[0]).logits
    left_out = drop_blocks(model, batches(), 1 / len(model.model.layers))
    assert left_out == 1 / len(model.model.layers)
    assert not idle.self_attn.o_proj.weight.any()
    assert not idle.mlp.down_proj.weight.any()
    assert all(block.mlp.down_proj.weight.any() for block in model.model.layers[1:])
    torch.testing.assert_close(model(batches()[0]).logits, before, atol=1e-2, rtol=1e-2)


@torch.no_grad()
def test_channels_are_dropped_evenly_and_a_copy_is_made_up_for(model):
    mlp = model.model.layers[0].mlp
    for projection in (mlp.gate_proj, mlp.up_proj):  # channel 1 computes what channel 0 does
        projection.weight[1] = projection.weight[0]
    mlp.down_proj.weight[:, 1] *= 1e-4
    expected = (mlp.down_proj.weight[:, 0] + mlp.down_proj.weight[:, 1]).clone()
    left_out = drop_channels(model, batches(), 0.1)
    assert left_out == pytest.approx(0.1, abs=0.03)
    assert not mlp.down_proj.weight[:, 1].any()
    torch.testing.assert_close(mlp.down_proj.weight[:, 0], expected, atol=0.02, rtol=0.3)
    zeros = [int((block.mlp.down_proj.weight == 0).all(dim=0).sum()) for block in model.model.layers]
    assert len(set(zeros)) == 1


@pytest.mark.parametrize(("pattern", "kept"), [("6:8", 0.75), ("25%", 0.75)])
def test_other_patterns_hold_in_every_layer(tmp_path, pattern, kept):
    source = random_model(tmp_path / "model", "Llama")
    np.save(tmp_path / "tokens.npy", torch.cat(batches()).numpy())
    layers = linear_layers(source)
    out, metered = tmp_path / "out", tmp_path / "meter.json"
    run_script(
        sys.executable, "prune_rival", pattern, str(source), str(tmp_path / "tokens.npy"), json.dumps(layers), str(out),
        str(metered),
    )  # fmt: skip
    tensors = load_file(out / "model.safetensors")
    for layer in layers:
        weight = tensors[f"{layer}.weight"].float()
        assert Pattern.parse(pattern).holds(weight) or pattern == "25%"
        assert (weight != 0).float().mean() == pytest.approx(kept, abs=0.02)
