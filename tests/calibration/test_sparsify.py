"""The walk through a model: what it writes, what it leaves alone, and what a killed run goes on from."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from calibration.config import Sparsity
from calibration.model.activation_file import ActivationFile
from calibration.model.blocks import HALVES, Blocks, Stream, forward_half
from calibration.model.channel_order import ChannelOrder
from calibration.pruning.block_finetune import finetune_block
from calibration.pruning.block_pruner import LayerReport
from calibration.pruning.solvers import SOLVERS, Pattern, Statistics
from calibration.pruning.solvers.masks import apply, dense_part, sparse_part
from calibration.pruning.sparsify import sparsify
from plugins.common.errors import UserError
from plugins.sparsity.declaration import Declaration
from plugins.sparsity.segments import Segments

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, head_dim=8, sliding_window=4),
    "qwen2": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen3": Qwen3Config(**SIZES, head_dim=16),
}
LINEARS = [f"self_attn.{n}_proj" for n in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
TOKENS = np.random.default_rng(0).integers(0, 96, (12, 16))


def make_model(directory: Path, config: PretrainedConfig | None = None, dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or CONFIGS["llama"]).to(dtype)
    model.save_pretrained(directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def names(*blocks: int) -> list[str]:
    return [f"model.layers.{block}.{linear}" for block in blocks for linear in LINEARS]


def prune(
    source: Path,
    out: Path,
    layers: list[str] | None = None,
    method: str = "sparsegpt",
    work: Path | None = None,
    progress=lambda stage, done, total: None,
) -> list[LayerReport]:
    layers = names(0, 1, 2) if layers is None else layers
    work = work or out.parent / f"{out.name}.work"
    return sparsify(source, TOKENS, Sparsity(method=method), Declaration(tuple(layers)), out, work, progress)


def is_2of4(weight: torch.Tensor) -> bool:
    return bool(((weight.unflatten(1, (-1, 4)) != 0).sum(2) <= 2).all())


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("llama"))


# what comes out


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "reconstruct", "modelopt-magnitude"])
def test_the_named_layers_are_2of4_and_nothing_else_changes(llama: Path, tmp_path: Path, method: str) -> None:
    layers = [name for name in names(0, 2) if "v_proj" not in name]
    reports = prune(llama, tmp_path / "out", layers, method)
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert weight.dtype == before[name].dtype
        if name.removesuffix(".weight") in layers:
            assert is_2of4(weight)
            assert not ((weight == 0) & weight.signbit()).any()
        elif method != "reconstruct" or name != "lm_head.weight":
            assert torch.equal(weight, before[name])
    declared = json.loads((tmp_path / "out/sparsity.json").read_text())
    assert declared == {"pattern": "2:4", "method": method, "layers": layers}
    if method == "reconstruct":
        head = reports.pop()
        assert (head.name, head.pruned) == ("lm_head", False)
    assert [report.name for report in reports] == layers
    assert all(report.pruned and report.zeros >= 0.5 and not report.note for report in reports)
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (llama / name).read_bytes()


@pytest.mark.parametrize("family", CONFIGS)
def test_block_by_block_gives_what_the_whole_model_gives(tmp_path: Path, family: str) -> None:
    source = make_model(tmp_path / "model", CONFIGS[family])
    tokens = torch.from_numpy(TOKENS)
    with torch.no_grad():
        blocks = Blocks(source)
        hidden = torch.cat(list(blocks.embed(tokens)))
        for number, arguments in enumerate(blocks.arguments(tokens.shape[1])):
            block = blocks.load(number)
            for half in HALVES:
                hidden = forward_half(block, half, hidden, arguments)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).model
        torch.testing.assert_close(model.norm(hidden), model(tokens).last_hidden_state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", CONFIGS)
def test_each_family_prunes_and_loads(tmp_path: Path, family: str) -> None:
    source = make_model(tmp_path / "model", CONFIGS[family])
    prune(source, tmp_path / "out", method="reconstruct")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(is_2of4(model.get_submodule(name).weight) for name in names(0, 1, 2))
    assert torch.isfinite(model(torch.from_numpy(TOKENS)).logits).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_sources_dtype_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    source = make_model(tmp_path / "model", dtype=dtype)
    prune(source, tmp_path / "out")
    weights = load_file(tmp_path / "out/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    assert all(is_2of4(weights[f"{name}.weight"]) for name in names(0, 1, 2))


def test_a_sharded_model_keeps_its_shards(llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shards = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    prune(tmp_path / "model", tmp_path / "sharded")
    prune(llama, tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors")) == shards
    parts = {k: v for name in shards for k, v in load_file(tmp_path / "sharded" / name).items()}
    for name, weight in load_file(tmp_path / "whole/model.safetensors").items():
        assert torch.equal(parts[name], weight)


def test_later_blocks_are_calibrated_on_what_the_pruned_ones_give(llama: Path, tmp_path: Path) -> None:
    prune(llama, tmp_path / "all")
    prune(llama, tmp_path / "last", names(2))
    name = "model.layers.2.mlp.down_proj.weight"
    weights = [load_file(tmp_path / which / "model.safetensors")[name] for which in ("all", "last")]
    assert not torch.equal(*weights)


def test_pickled_weights_are_left_behind(llama: Path, tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    (source / "pytorch_model.bin").write_bytes(b"weights of before")
    prune(source, tmp_path / "out", names(0))
    assert not (tmp_path / "out/pytorch_model.bin").exists()


def test_tuning_brings_the_block_nearer_to_the_dense_one_and_keeps_the_mask(tmp_path: Path) -> None:
    blocks = Blocks(make_model(tmp_path / "model", dtype=torch.float32))
    arguments, block = blocks.arguments(TOKENS.shape[1])[0], blocks.load(0)
    entering, target = (
        ActivationFile(tmp_path / name, (*TOKENS.shape, SIZES["hidden_size"])) for name in ("in", "out")
    )
    names = [name for name in LINEARS if "v_proj" not in name]
    with torch.no_grad():
        entering.write(blocks.embed(torch.from_numpy(TOKENS)))
        hidden = entering.read(range(len(TOKENS)))
        wanted = block(hidden, **arguments)
        target.write([wanted])
        for name in names:
            weight = block.get_submodule(name).weight
            weight.copy_(apply(weight, Pattern.parse("2:4").select(weight.abs())))
        masks = {name: block.get_submodule(name).weight != 0 for name in names}
        untouched = block.get_submodule("self_attn.v_proj").weight.clone()
        before = (block(hidden, **arguments) - wanted).square().mean()
        whole = {name: Segments.split("rows", len(masks[name]), len(masks[name])) for name in names}
        finetune_block(Stream(block, entering), whole, target, arguments)
        after = (block(hidden, **arguments) - wanted).square().mean()
    assert after < before
    assert all((block.get_submodule(name).weight[~mask] == 0).all() for name, mask in masks.items())
    assert torch.equal(block.get_submodule("self_attn.v_proj").weight, untouched)


# layers that stay as they are


def test_a_layer_that_is_2of4_already_keeps_every_byte_and_says_so(llama: Path, tmp_path: Path) -> None:
    prune(llama, tmp_path / "once", method="magnitude")
    reports = prune(tmp_path / "once", tmp_path / "twice", method="reconstruct")
    weights = [(tmp_path / which / "model.safetensors").read_bytes() for which in ("once", "twice")]
    assert weights[0] == weights[1]
    assert all(report.pruned and report.note == "2:4 already: mask kept" for report in reports)
    assert json.loads((tmp_path / "twice/sparsity.json").read_text())["layers"] == names(0, 1, 2)


def test_a_layer_whose_inputs_do_not_divide_by_4_is_listed_and_left(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", LlamaConfig(**{**SIZES, "intermediate_size": 50}))
    reports = prune(source, tmp_path / "out", method="reconstruct")
    kept = [report for report in reports if not report.pruned and report.name != "lm_head"]
    assert [report.name for report in kept] == [f"model.layers.{block}.mlp.down_proj" for block in range(3)]
    assert kept[0].note == "50 inputs do not divide into groups of 4"
    declared = json.loads((tmp_path / "out/sparsity.json").read_text())["layers"]
    assert not any("down_proj" in name for name in declared)


# the same bytes again


@pytest.mark.parametrize("method", ["magnitude", "reconstruct"])
def test_a_run_stopped_at_any_block_goes_on_to_the_same_bytes(llama: Path, tmp_path: Path, method: str) -> None:
    prune(llama, tmp_path / "straight", method=method)
    for stop in (1, 2, 3):
        out, work = tmp_path / f"out{stop}", tmp_path / f"work{stop}"

        def fail(stage: str, done: int, total: int, stop: int = stop) -> None:
            if done == stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prune(llama, out, method=method, work=work, progress=fail)
        assert not out.exists()
        done: list[int] = []
        prune(llama, out, method=method, work=work, progress=lambda _, at, total, done=done: done.append(at))
        assert done[0] == stop
        assert contents(out) == contents(tmp_path / "straight")


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from test_sparsify import prune
kill = lambda stage, done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 2 else None
prune(Path(sys.argv[1]), Path(sys.argv[2]), method="reconstruct", work=Path(sys.argv[3]), progress=kill)
"""


def test_a_killed_process_leaves_what_another_goes_on_from(llama: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    arguments = [sys.executable, "-c", KILLED, str(llama), str(out), str(work), str(Path(__file__).parent)]
    root = str(Path(__file__).parents[2])
    killed = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": root}, cwd=root, check=False)
    assert killed.returncode == -signal.SIGKILL
    done: list[int] = []
    prune(llama, out, method="reconstruct", work=work, progress=lambda _, at, total: done.append(at))
    assert done == [2, 3]
    prune(llama, tmp_path / "straight", method="reconstruct")
    assert contents(out) == contents(tmp_path / "straight")


def test_finished_blocks_of_other_weights_or_another_method_are_not_used(llama: Path, tmp_path: Path) -> None:
    prune(llama, tmp_path / "first", work=tmp_path / "work")
    other = make_model(tmp_path / "other", LlamaConfig(**SIZES, rms_norm_eps=1e-5))
    weights = load_file(other / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"] *= 2
    save_file(weights, str(other / "model.safetensors"), {"format": "pt"})
    for source, method in ((other, "sparsegpt"), (llama, "wanda")):
        prune(source, tmp_path / f"shared-{method}", method=method, work=tmp_path / "work")
        prune(source, tmp_path / f"own-{method}", method=method)
        assert contents(tmp_path / f"shared-{method}") == contents(tmp_path / f"own-{method}")


# input that is wrong


@pytest.mark.parametrize(
    "name", ["lm_head", "model.layers.9.mlp.up_proj", "model.layers.0.mlp", "model.layers.x.y", "a"]
)
def test_a_name_that_is_no_layer_of_a_block_is_quoted(llama: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' is no linear layer of a decoder block"):
        prune(llama, tmp_path / "out", [name])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "reconstruct"])
def test_weights_that_are_not_finite_name_the_first_layer_they_reach(tmp_path: Path, method: str) -> None:
    source = make_model(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, str(source / "model.safetensors"), {"format": "pt"})
    with pytest.raises(UserError, match=r"'model\.layers\.1\.mlp\.(up|down)_proj'"):
        prune(source, tmp_path / "out", method=method)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, str(source / "model.safetensors"), {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the tensor 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        prune(source, tmp_path / "out")


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors' is not a whole safetensors file"):
        prune(source, tmp_path / "out")


def test_a_missing_shard_is_named(llama: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"names '{shard.name}', which is missing"):
        prune(tmp_path / "model", tmp_path / "out")


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    with pytest.raises(UserError, match="'gpt2', which cannot be pruned: use one of llama"):
        prune(source, tmp_path / "out")


# ModelOpt


def test_modelopt_keeps_our_zeros_through_training_and_folds_them(llama: Path, tmp_path: Path) -> None:
    mts = pytest.importorskip("modelopt.torch.sparsity")
    from calibration.pruning.modelopt import apply_modelopt_masks

    layers = names(0, 1)
    prune(llama, tmp_path / "out", layers)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    zeros = {name: model.get_submodule(name).weight == 0 for name in layers}
    start = model.get_submodule(layers[0]).weight.detach().clone()
    model = apply_modelopt_masks(model, layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tokens = torch.from_numpy(TOKENS)
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    model = mts.export(model)
    for name in layers:
        folded = model.get_submodule(name)
        assert type(folded) is nn.Linear
        assert (folded.weight[zeros[name]] == 0).all()
    assert not torch.equal(model.get_submodule(layers[0]).weight, start)
    assert not any("_weight_mask" in name for name in model.state_dict())
    assert (model.get_submodule(names(2)[0]).weight != 0).all()


def test_modelopts_sparsegpt_prunes_the_named_layers(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("modelopt.torch.sparsity")
    layers = names(1)
    prune(llama, tmp_path / "out", layers, "modelopt-sparsegpt")
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for name, weight in after.items():
        assert weight.ndim == 1 or is_2of4(weight) == (name.removesuffix(".weight") in layers)
        kept = weight != 0
        assert torch.equal(weight[kept], before[name][kept])


# layers that are 2:4 in part

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
    ("target", "words"),
    [
        (Declaration(hybrid={names(0)[-1]: Segments.split("inputs", 96, 32)}), "cover 96 of its 48 inputs"),
        (Declaration(hybrid={"lm_head": Segments.split("rows", 96, 32)}), "is no linear layer of a decoder block"),
        (Declaration(order={"model.layers.0.mlp": (0, 1)}), "each channel from 0 to 47 once"),
    ],
)
def test_a_target_that_does_not_fit_the_model_is_refused(
    llama: Path, tmp_path: Path, target: Declaration, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        prune_to(llama, tmp_path / "out", target, "sparsegpt")


def test_modelopts_methods_prune_whole_layers_only(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="whole layers only"):
        prune_to(llama, tmp_path / "out", Declaration(order={"model.layers.0.mlp": range(48)}), "modelopt-magnitude")
