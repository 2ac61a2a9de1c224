"""Builds that are 2:4 in part: from the recipe's fraction to tokens, the proofs of the files, and their attacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from builder.engines.torch_backend import artifact
from builder.verify import verify
from plugins.sparsity.declaration import Declaration
from tests.support.command import done, refused, twofour
from tests.support.greedy import check_greedy_tokens
from tests.support.models import random_model

FEW = ("calibration.samples=8", "calibration.sequence_length=64", "sparsity.method=sparsegpt", "sparsity.fraction=50%")


def settings(*values: str) -> list[str]:
    return [option for value in values for option in ("--set", value)]


@pytest.fixture(scope="module")
def built(docs_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hybrid")
    out = root / "out"
    options = (*settings(*FEW), "--until", "engine", "--store", root / "store", "--out", out)
    done("build", docs_llama, "--preset", "2of4-all", *options)
    return out


def test_half_of_the_weights_are_2of4_and_every_proof_holds(built: Path) -> None:
    declared = Declaration.read(built / "checkpoint")
    assert len(declared.hybrid) > 10
    assert declared.order
    explained = twofour("explain", built, "--json").json["layers"]
    blocks = [row for row in explained if row["name"] != "lm_head"]
    weights = [row["out_features"] * row["in_features"] for row in blocks]
    share = sum(row["fraction"] * size for row, size in zip(blocks, weights, strict=True)) / sum(weights)
    assert share == pytest.approx(0.5, abs=0.02)
    assert all(row["valid_pattern"] for row in blocks if row["sparse"])
    assert verify(built / "checkpoint").ok
    assert "2:4 in " in done("explain", built).stdout


def test_transformers_and_the_engine_give_the_same_logits(built: Path) -> None:
    tokens = torch.arange(20, 52)[None]
    model = AutoModelForCausalLM.from_pretrained(built / "checkpoint", dtype=torch.float32).eval()
    engine = artifact.load(built / "engine", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(engine.logits(tokens), model(tokens).logits, atol=1e-3, rtol=1e-3)


def test_transformers_and_the_engine_give_the_same_greedy_tokens(built: Path) -> None:
    check_greedy_tokens(built)


def test_the_engine_stores_each_part_packed(built: Path) -> None:
    stored = load_file(built / "engine/model.safetensors")
    name, segments = next(iter(Declaration.read(built / "checkpoint").hybrid.items()))
    dense = load_file(built / "checkpoint/model.safetensors")[f"{name}.weight"]
    packed = sum(stored[f"{name}.{key}"].nbytes for key in ("weight_values", "weight_indices", "weight_dense"))
    assert packed == pytest.approx(dense.nbytes * (1 - segments.fraction * 7 / 16))
    assert f"{name}.weight" not in stored


def test_a_fraction_below_one_step_is_dense_and_is_reported(docs_llama: Path, tmp_path: Path) -> None:
    options = settings(*FEW, "sparsity.fraction=0.0001")
    where = ("--until", "checkpoint", "--store", tmp_path / "store", "--out", tmp_path / "out")
    outcome = done("build", docs_llama, "--preset", "2of4-all", *options, *where)
    assert "warning: sparsity.fraction is less than one step of any layer: all layers stay dense" in outcome.stderr
    before, after = (load_file(path / "model.safetensors") for path in (docs_llama, tmp_path / "out/checkpoint"))
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_plan_counts_the_fraction(docs_llama: Path) -> None:
    def bytes_of(*options: str) -> int:
        return int(done("plan", docs_llama, "--preset", "2of4-all", *settings(*options), "--json").json["built_bytes"])

    dense, half, whole = bytes_of("sparsity.exclude=['*']"), bytes_of("sparsity.fraction=50%"), bytes_of()
    assert dense - half == pytest.approx((dense - whole) / 2, rel=1e-3)


def first_hybrid(directory: Path, axis: str) -> str:
    hybrid = Declaration.read(directory).hybrid
    return next(layer for layer, segments in hybrid.items() if segments.axis == axis)


def break_a_segment(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors[f"{first_hybrid(directory, 'rows')}.weight"][0, 8:12] = 1
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def move_the_boundary(directory: Path) -> None:
    change(directory, lambda content, layer: content["hybrid"][layer].update(segments=[["2:4", 17], ["dense", 751]]))


def cover_too_little(directory: Path) -> None:
    change(directory, lambda content, layer: content["hybrid"][layer].update(segments=[["2:4", 32]]))


def cut_a_head(directory: Path) -> None:
    """q_proj has 256 rows, 128 for each key-value head."""
    path = directory / "sparsity.json"
    content = json.loads(path.read_text())
    layer = next(name for name in content["hybrid"] if name.endswith("q_proj"))
    content["hybrid"][layer]["segments"] = [["2:4", 32], ["dense", content_rows(directory, layer) - 32]]
    path.write_text(json.dumps(content))


def content_rows(directory: Path, layer: str) -> int:
    return len(load_file(directory / "model.safetensors")[f"{layer}.weight"])


def claim_more(directory: Path) -> None:
    """The order of segments turned around: dense rows are claimed 2:4."""
    change(directory, lambda content, layer: content["hybrid"][layer]["segments"].reverse())


def repeat_a_channel(directory: Path) -> None:
    change(directory, lambda content, layer: content["order"].update({layer.rpartition(".")[0]: "0 0 1"}))


def change(directory: Path, edit: Any) -> None:
    path = directory / "sparsity.json"
    content = json.loads(path.read_text())
    edit(content, first_hybrid(directory, "rows"))
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("attack", "fragment"),
    [
        (break_a_segment, "4 of 4 values are nonzero, 2:4 allows 2', file='model.safetensors'"),
        (move_the_boundary, "has a segment of 17 rows: it must be a multiple of 32"),
        (cover_too_little, "cover 32 of its"),
        (cut_a_head, "begins at 32, within a head"),
        (claim_more, "2:4 allows 2"),
        (repeat_a_channel, "does not contain each channel from 0 to 2 once"),
    ],
)
def test_verify_reports_each_violation(built: Path, tmp_path: Path, attack: Any, fragment: str) -> None:
    shutil.copytree(built / "checkpoint", tmp_path / "checkpoint")
    attack(tmp_path / "checkpoint")
    actual = verify(tmp_path / "checkpoint").violations
    assert any(fragment in str(violation) for violation in actual), [str(violation) for violation in actual]


def swap_the_order(directory: Path) -> None:
    def edit(content: dict[str, Any], layer: str) -> None:
        half = layer.rpartition(".")[0]
        first, second, *others = content["order"][half].split()
        content["order"][half] = " ".join([second, first, *others])

    change(directory, edit)


def test_the_order_is_that_of_the_dense_model(built: Path, docs_llama: Path, tmp_path: Path) -> None:
    done("verify", built / "checkpoint", "--dense", docs_llama)
    shutil.copytree(built / "checkpoint", tmp_path / "checkpoint")
    swap_the_order(tmp_path / "checkpoint")
    violations = verify(tmp_path / "checkpoint", dense=docs_llama).violations
    assert violations
    assert all("is not the dense model's row" in str(each) or "input" in str(each) for each in violations)


def test_another_model_proves_no_order(built: Path, tmp_path: Path) -> None:
    other = random_model(tmp_path / "other", "Llama")
    assert "is not the dense model of" in refused("verify", built / "checkpoint", "--dense", other, "--json")


def test_ranks_without_their_share_are_detected(built: Path) -> None:
    messages = [str(violation) for violation in verify(built / "checkpoint", tensor_parallel=2).violations]
    assert any("are 2:4 on 2 ranks: prune for engine.tensor_parallel" in each for each in messages)


def test_modelopts_methods_refuse_a_fraction(docs_llama: Path, tmp_path: Path) -> None:
    options = settings("sparsity.fraction=50%", "sparsity.method=modelopt-sparsegpt")
    message = refused("build", docs_llama, "--preset", "2of4-all", *options, "--out", tmp_path / "out", "--json")
    assert "method modelopt-sparsegpt prunes whole layers only: use reconstruct or sparsegpt" in message
