"""The output head after pruning: what it makes up for, and when it stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from calibration.model.activation_file import ActivationFile
from calibration.model.blocks import Blocks
from calibration.pruning.block_pruner import LayerReport, Outcome
from calibration.pruning.lm_head_refit import refit_head
from tests.support.pruning import CONFIGS, SIZES, make_model, prune

D = SIZES["hidden_size"]
MIXED = torch.eye(D) + 0.2 * torch.randn(D, D, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    return Blocks(make_model(tmp_path_factory.mktemp("model"), dtype=torch.float32))


def hidden(samples: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, 16, D, generator=torch.Generator().manual_seed(seed))


def states(path: Path, hidden_BTD: Tensor) -> ActivationFile:
    kept = ActivationFile(path, hidden_BTD.shape)
    kept.write([hidden_BTD])
    return kept


def refit(blocks: Blocks, tmp_path: Path, pruned: Tensor, dense: Tensor) -> tuple[LayerReport, Tensor]:
    report, weight = refit_head(blocks, states(tmp_path / "pruned", pruned), states(tmp_path / "dense", dense))
    assert (report.name, report.pruned, report.zeros) == ("lm_head", False, 0.0)
    return report, weight


def divergence(blocks: Blocks, pruned: Tensor, dense: Tensor, head: Tensor) -> float:
    norm, original = blocks.load_norm(), blocks.weights.read("lm_head.weight")
    wanted, given = (norm(dense) @ original.T).log_softmax(-1), (norm(pruned) @ head.T).log_softmax(-1)
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


def test_the_model_comes_nearer_to_the_dense_one_on_samples_it_never_saw(blocks: Blocks, tmp_path: Path) -> None:
    report, weight = refit(blocks, tmp_path, hidden(64) @ MIXED, hidden(64))
    unseen = hidden(16, seed=2)
    old, new = (
        divergence(blocks, unseen @ MIXED, unseen, head) for head in (blocks.weights.read("lm_head.weight"), weight)
    )
    assert new < 0.3 * old
    assert report.outcome == Outcome.REFITTED
    before, after = (float(word) for word in report.note.removesuffix(" nats").split("samples ")[1].split(" -> "))
    assert (before, after) == pytest.approx((old, new), rel=0.2)


def test_a_change_that_does_not_hold_on_samples_held_back_is_not_made(blocks: Blocks, tmp_path: Path) -> None:
    dense = hidden(64)
    pruned = dense @ MIXED
    pruned[::8] = dense[::8] @ (2 * torch.eye(D) - MIXED)
    report, weight = refit(blocks, tmp_path, pruned, dense)
    assert report.outcome == Outcome.NOT_REFITTED
    assert torch.equal(weight, blocks.weights.read("lm_head.weight"))


@pytest.mark.parametrize("samples", [1, 64])
def test_nothing_to_judge_by_leaves_the_head(blocks: Blocks, tmp_path: Path, samples: int) -> None:
    """One sample, of which none can be held back; or states that pruning did not change."""
    dense = hidden(samples)
    report, weight = refit(blocks, tmp_path, dense @ MIXED if samples == 1 else dense, dense)
    assert report.outcome == Outcome.NOT_REFITTED
    assert torch.equal(weight, blocks.weights.read("lm_head.weight"))


def test_a_head_that_is_the_embedding_stays(tmp_path: Path) -> None:
    source = make_model(tmp_path / "tied", LlamaConfig(**SIZES, tie_word_embeddings=True))
    reports = prune(source, tmp_path / "out", method="reconstruct")
    assert "lm_head" not in [report.name for report in reports]
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])


@pytest.mark.parametrize("family", CONFIGS)
def test_each_family_loads_with_the_head_that_was_written(tmp_path: Path, family: str) -> None:
    source = make_model(tmp_path / "model", CONFIGS[family])
    prune(source, tmp_path / "out", method="reconstruct")
    written = load_file(tmp_path / "out/model.safetensors")["lm_head.weight"]
    assert written.dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.weight, written)
