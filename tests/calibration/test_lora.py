"""The adapter that takes back what pruning left: how near it brings the model, its files, and the recipe's option."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from calibration.config import Sparsity
from calibration.lora.eora import compensate
from calibration.lora.low_rank import low_rank, output_error
from calibration.pruning.sparsify import sparsify
from plugins.common.errors import UserError
from plugins.sparsity.declaration import Declaration
from tests.support.command import done, refused
from tests.support.models import cut_llama, write_recipe

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
LAYERS = [f"model.layers.{block}.{linear}" for block in range(2) for linear in LINEARS]
LEFT_DENSE = "model.layers.1.self_attn.v_proj"
TOKENS = np.random.default_rng(0).integers(0, 96, (12, 16))
RANK = 4


def quietly(*_: object) -> None:
    pass


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dense model in float32, and the same pruned, but for one layer."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=2, vocab_size=96, max_position_embeddings=64, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "dense")
    layers = [name for name in LAYERS if name != LEFT_DENSE]
    magnitude = Sparsity(method="magnitude")
    sparsify(
        folder / "dense", TOKENS, magnitude, Declaration(tuple(layers)), folder / "pruned", folder / "work", quietly
    )
    return folder / "dense", folder / "pruned"


def adapter(models: tuple[Path, Path], out: Path, rank: int = RANK) -> tuple[dict[str, Tensor], Any, list[Any]]:
    """The tensors, the config and the reports of an adapter for the pruned model."""
    reports = compensate(*models, TOKENS, rank, out, out.with_suffix(".work"), quietly)
    config = json.loads((out / "adapter_config.json").read_text())
    return load_file(out / "adapter_model.safetensors"), config, reports


def logits(directory: Path, tensors: dict[str, Tensor] | None = None) -> Tensor:
    """Of the model, with an adapter's B A added to its weights."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        for name in [name for name in tensors or {} if "lora_A" in name]:
            layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            layer.weight += tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        return model(torch.from_numpy(TOKENS)).logits


def test_the_adapter_brings_the_logits_nearer_to_the_dense_ones(models: tuple[Path, Path], tmp_path: Path) -> None:
    tensors, _, reports = adapter(models, tmp_path / "out")
    dense, pruned = map(logits, models)
    compensated = logits(models[1], tensors)
    assert (compensated - dense).norm() < 0.9 * (pruned - dense).norm()
    assert [report.name for report in reports] == [name for name in LAYERS if name != LEFT_DENSE]
    assert all(0.1 < report.taken_back < 1 for report in reports)


def test_what_is_reported_is_the_share_of_the_error_over_the_pruned_models_own_inputs(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    tensors, _, reports = adapter(models, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(models[1]).eval()
    seen: dict[str, Tensor] = {}
    for report in reports:
        layer = model.get_submodule(report.name)
        layer.register_forward_pre_hook(lambda _, args, name=report.name: seen.update({name: args[0].flatten(0, 1)}))
    with torch.no_grad():
        model(torch.from_numpy(TOKENS))
    dense, pruned = (load_file(model / "model.safetensors") for model in models)
    for report in reports:
        error_NK = dense[f"{report.name}.weight"] - pruned[f"{report.name}.weight"]
        a_RK, b_NR = (tensors[f"base_model.model.{report.name}.lora_{part}.weight"] for part in "AB")
        x_MK = seen[report.name]
        left = (x_MK @ (error_NK - b_NR @ a_RK).T).square().sum() / (x_MK @ error_NK.T).square().sum()
        assert report.taken_back == pytest.approx(1 - left.item(), abs=1e-4)


def test_full_rank_gives_back_the_dense_model(models: tuple[Path, Path], tmp_path: Path) -> None:
    dense, pruned = (load_file(model / "model.safetensors") for model in models)
    full = 16  # of k_proj and v_proj
    tensors, _, _ = adapter(models, tmp_path / "out", full)
    whole = 0
    for name in LAYERS:
        weight = f"{name}.weight"
        if name != LEFT_DENSE and min(dense[weight].shape) == full:
            a_RK, b_NR = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
            assert torch.allclose(pruned[weight] + b_NR @ a_RK, dense[weight], atol=1e-5)
            whole += 1
    assert whole == 3


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_no_approximation_of_that_rank_has_less_weighted_error(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    error_NK = torch.randn(shape, generator=generator)
    scale_K = torch.logspace(0, 1.5, shape[1])
    x_MK = torch.randn(500, shape[1], generator=generator) * scale_K
    hessian_KK = x_MK.T @ x_MK / 500
    b_NR, a_RK = low_rank("layer", error_NK, hessian_KK, RANK)
    actual = output_error(error_NK - b_NR @ a_RK, hessian_KK)

    u, s, vh = torch.linalg.svd(error_NK, full_matrices=False)
    plain = output_error(error_NK - (u[:, :RANK] * s[:RANK]) @ vh[:RANK], hessian_KK)
    values, q_KK = torch.linalg.eigh(hessian_KK.double())
    left_S = torch.linalg.svdvals(error_NK.double() @ (q_KK * values.sqrt()))[RANK:]
    best = left_S.square().sum().item()  # Eckart and Young
    assert best * 0.9999 <= actual <= best * 1.01 < plain

    b_NR, a_RK = low_rank("layer", error_NK, hessian_KK, min(shape))
    assert torch.allclose(b_NR @ a_RK, error_NK, atol=1e-4)


def test_inputs_that_never_occur_do_no_harm() -> None:
    error_NK = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    b_NR, a_RK = low_rank("layer", error_NK, torch.zeros(24, 24), 24)
    assert torch.allclose(b_NR @ a_RK, error_NK, atol=1e-4)


def test_files_are_as_peft_stores_them(models: tuple[Path, Path], tmp_path: Path) -> None:
    tensors, config, _ = adapter(models, tmp_path / "out")
    dense = load_file(models[0] / "model.safetensors")
    layers = [name for name in LAYERS if name != LEFT_DENSE]
    assert tensors.keys() == {f"base_model.model.{name}.lora_{part}.weight" for name in layers for part in "AB"}
    for name in layers:
        out_features, in_features = dense[f"{name}.weight"].shape
        assert tensors[f"base_model.model.{name}.lora_A.weight"].shape == (RANK, in_features)
        assert tensors[f"base_model.model.{name}.lora_B.weight"].shape == (out_features, RANK)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["r"] == config["lora_alpha"] == RANK
    assert config["target_modules"] == sorted(linear.rsplit(".", 1)[-1] for linear in LINEARS)
    assert config["exclude_modules"] == [LEFT_DENSE]
    assert config["base_model_name_or_path"] == "checkpoint"


def test_peft_loads_it_and_gives_the_same_logits(models: tuple[Path, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tensors, _, _ = adapter(models, tmp_path / "out")
    base = AutoModelForCausalLM.from_pretrained(models[1]).eval()
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "out"))
    adapted = [name for name, _ in model.named_modules() if name.endswith("lora_A.default")]
    assert len(adapted) == len(tensors) // 2
    with torch.no_grad():
        actual = model(torch.from_numpy(TOKENS)).logits
    assert torch.allclose(actual, logits(models[1], tensors), atol=1e-4)


def test_a_killed_run_ends_with_the_same_bytes(models: tuple[Path, Path], tmp_path: Path) -> None:
    adapter(models, tmp_path / "out")

    def die(_: str, number: int, count: int) -> None:
        if number == 1:
            raise KeyboardInterrupt

    out, work = tmp_path / "again", tmp_path / "work"
    with pytest.raises(KeyboardInterrupt):
        compensate(*models, TOKENS, RANK, out, work, die)
    steps: list[int] = []
    compensate(*models, TOKENS, RANK, out, work, lambda _, number, count: steps.append(number))
    compensate(*models, TOKENS, RANK, out, work, lambda _, number, count: steps.append(number))
    assert steps == [1, 2, 2]
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "out" / name).read_bytes()

    steps.clear()
    compensate(*models, TOKENS, RANK - 1, out, work, lambda _, number, count: steps.append(number))
    assert steps == [0, 1, 2]  # another run's blocks are of no use


def test_what_cannot_be_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    for rank, pruned, fragment in (
        (17, models[1], r"adapter_rank 17 .*k_proj.* 16 or less"),
        (4, models[0], "no layer"),
    ):
        with pytest.raises(UserError, match=fragment) as error:
            compensate(models[0], pruned, TOKENS, rank, tmp_path / "out", tmp_path / "work", quietly)
        assert "\n" not in str(error.value)


def test_inputs_that_are_not_finite_are_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    tensors = load_file(models[1] / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    shutil.copytree(models[1], tmp_path / "broken")
    save_file(tensors, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"inputs of 'model.layers.0.mlp.down_proj' are not finite"):
        compensate(models[0], tmp_path / "broken", TOKENS, RANK, tmp_path / "out", tmp_path / "work", quietly)


def test_a_build_writes_the_adapter_and_notes_that_the_engine_does_not_apply_it(tmp_path: Path) -> None:
    model = cut_llama(tmp_path / "llama")
    recipe, out, store = write_recipe(tmp_path / "recipe.yaml", model), tmp_path / "out", tmp_path / "store"
    options = ("--preset", "2of4-all", "--set", "sparsity.method=magnitude", "--until", "checkpoint")
    done("build", recipe, *options, "--out", out, "--store", store)
    assert not (out / "adapter").exists()
    printed = done("build", recipe, *options, "--set", "sparsity.adapter_rank=8", "--out", out, "--store", store).stderr
    assert "sparsify: cached" in printed
    assert "checkpoint: cached" in printed
    assert done("verify", out, "--json").json["violations"] == []
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 7
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    notes = json.loads((out / "report" / "report.json").read_text())["notes"]
    assert any("The engine does not apply it" in note for note in notes)

    message = refused("plan", recipe, *options[:4], "--set", "sparsity.adapter_rank=100000", "--json")
    assert message.startswith("sparsity.adapter_rank 100000 exceeds the largest rank of")
