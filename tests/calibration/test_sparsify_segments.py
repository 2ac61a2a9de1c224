"""Pruning of layers that are 2:4 in part: segments, dense inputs, targets that do not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
)

from calibration.config import Sparsity
from calibration.model.channel_order import ChannelOrder
from calibration.pruning.block_pruner import LayerReport
from calibration.pruning.solvers import SOLVERS, Pattern, Statistics
from calibration.pruning.solvers.masks import dense_part, sparse_part
from calibration.pruning.sparsify import sparsify
from plugins.common.errors import UserError
from plugins.sparsity.declaration import Declaration
from plugins.sparsity.segments import Segments
from tests.support.pruning import SIZES, TOKENS, is_2of4, make_model, names

WIDE = {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


def hybrid_target(ranks: int = 1) -> Declaration:
    """Half of each block's channels 2:4, in the order that a seed draws; of block 1 nothing."""
    hybrid: dict[str, Segments] = {}
    order: dict[str, tuple[int, ...]] = {}
    random = np.random.default_rng(0)
    for number in (0, 2):
        block = f"model.layers.{number}"
        for name, axis, size in (
            ("mlp.gate_proj", "rows", 128), ("mlp.up_proj", "rows", 128), ("mlp.down_proj", "inputs", 128),
            ("self_attn.q_proj", "rows", 128), ("self_attn.o_proj", "inputs", 128), ("self_attn.v_proj", "rows", 64),
        ):  # fmt: skip
            hybrid[f"{block}.{name}"] = Segments.split(axis, size, size // 2, ranks if size == 128 else 1)
        order |= {
            f"{block}.mlp": tuple(random.permutation(128).tolist()),
            f"{block}.self_attn": tuple(random.permutation(2).tolist()),
        }
    return Declaration(("model.layers.0.self_attn.k_proj",), hybrid, order)


def prune_to(source: Path, out: Path, target: Declaration, method: str) -> list[LayerReport]:
    return sparsify(source, TOKENS, Sparsity(method=method), target, out, out.parent / f"{out.name}.work", quiet)


def quiet(stage: str, done: int, total: int) -> None: ...


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "reconstruct"])
def test_the_2of4_segments_are_pruned_and_the_dense_ones_stay_full(tmp_path: Path, method: str, ranks: int) -> None:
    source = make_model(tmp_path / "model", LlamaConfig(**{**SIZES, **WIDE}))
    target = hybrid_target(ranks)
    reports = prune_to(source, tmp_path / "out", target, method)
    declared = Declaration.read(tmp_path / "out")
    assert (declared.layers, declared.hybrid, declared.order) == (target.layers, target.hybrid, target.order)
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    moving = ChannelOrder(AutoModelForCausalLM.from_pretrained(source).config, target.order)
    for name, weight in after.items():
        dense = moving.apply(name, before[name])
        segments = target.hybrid.get(name.removesuffix(".weight"))
        if segments is None:
            same = name in ("lm_head.weight", "model.layers.0.self_attn.k_proj.weight")
            assert same or torch.equal(weight, dense)
            continue
        assert is_2of4(sparse_part(weight, segments))
        free = dense_part(weight, segments).expand_as(weight)
        assert (weight[free] != 0).float().mean() > 0.99
        if method in ("magnitude", "wanda"):
            assert torch.equal(weight[free], dense[free])
    fractions = {report.name: report.fraction for report in reports if report.name != "lm_head"}
    assert set(fractions.values()) == {0.5, 1.0}


def test_the_dense_inputs_make_up_for_the_2of4_ones(tmp_path: Path) -> None:
    """Down to the same zeros, the output error is smaller where the dense inputs come behind the pruned ones."""
    weight, hessian = torch.randn(16, 128), torch.eye(128) + 0.5
    pattern, whole = Pattern.parse("2:4"), Segments.split("rows", 16, 16)
    segments = Segments.of("inputs", [("dense", 64), ("2:4", 64)])

    def error(pruned: torch.Tensor) -> float:
        return float(((weight - pruned) @ hessian * (weight - pruned)).sum())

    free = SOLVERS["sparsegpt"]().prune("layer", weight, Statistics(hessian), pattern, segments)
    alone = weight.clone()
    alone[:, 64:] = SOLVERS["sparsegpt"]().prune("layer", weight[:, 64:], Statistics(hessian[64:, 64:]), pattern, whole)
    assert error(free) < error(alone)


@pytest.mark.parametrize(
    ("target", "fragment"),
    [
        (Declaration(hybrid={names(0)[-1]: Segments.split("inputs", 96, 32)}), "cover 96 of its 48 inputs"),
        (Declaration(hybrid={"lm_head": Segments.split("rows", 96, 32)}), "is not a linear layer of a decoder block"),
        (Declaration(order={"model.layers.0.mlp": (0, 1)}), "each channel from 0 to 47 once"),
    ],
)
def test_a_target_that_does_not_fit_the_model_is_refused(
    llama: Path, tmp_path: Path, target: Declaration, fragment: str
) -> None:
    with pytest.raises(UserError, match=fragment):
        prune_to(llama, tmp_path / "out", target, "sparsegpt")


def test_modelopts_methods_prune_whole_layers_only(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="whole layers only"):
        prune_to(llama, tmp_path / "out", Declaration(order={"model.layers.0.mlp": range(48)}), "modelopt-magnitude")
