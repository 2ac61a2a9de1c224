"""The walk through a model: what it writes, what it does not change, and how a killed run resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
)

from calibration.model.activation_file import ActivationFile
from calibration.model.blocks import HALVES, Blocks, Stream, forward_half
from calibration.pruning.block_finetune import finetune_block
from calibration.pruning.solvers import Pattern
from calibration.pruning.solvers.masks import apply
from plugins.sparsity.segments import Segments
from tests.support.pruning import CONFIGS, LINEARS, SIZES, TOKENS, is_2of4, make_model, names, prune


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


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


def tune_block(directory: Path, names: list[str]) -> tuple[torch.nn.Module, dict[str, torch.Tensor], torch.Tensor]:
    """Block 0 with `names` pruned and tuned, their weights before it, and the output's error before and after."""
    blocks = Blocks(make_model(directory / "model", dtype=torch.float32))
    arguments, block = blocks.arguments(TOKENS.shape[1])[0], blocks.load(0)
    entering, target = (
        ActivationFile(directory / name, (*TOKENS.shape, SIZES["hidden_size"])) for name in ("in", "out")
    )
    with torch.no_grad():
        entering.write(blocks.embed(torch.from_numpy(TOKENS)))
        hidden = entering.read(range(len(TOKENS)))
        wanted = block(hidden, **arguments)
        target.write([wanted])
        for name in names:
            weight = block.get_submodule(name).weight
            weight.copy_(apply(weight, Pattern.parse("2:4").select(weight.abs())))
        pruned = {name: block.get_submodule(name).weight.clone() for name in LINEARS}
        whole = {name: Segments.split("rows", len(pruned[name]), len(pruned[name])) for name in names}
        before = (block(hidden, **arguments) - wanted).square().mean()
        finetune_block(Stream(block, entering), whole, target, arguments)
        after = (block(hidden, **arguments) - wanted).square().mean()
    return block, pruned, torch.stack([before, after])


def test_tuning_brings_the_block_nearer_to_the_dense_one_and_keeps_the_mask(tmp_path: Path) -> None:
    block, pruned, errors = tune_block(tmp_path, [name for name in LINEARS if "v_proj" not in name])
    assert errors[1] < errors[0]
    assert all((block.get_submodule(name).weight[weight == 0] == 0).all() for name, weight in pruned.items())
    assert torch.equal(block.get_submodule("self_attn.v_proj").weight, pruned["self_attn.v_proj"])


def test_tuning_takes_smaller_steps_where_fewer_weights_are_zero(tmp_path: Path) -> None:
    name, moved = "mlp.down_proj", {}
    for tuned in (LINEARS, [name]):
        block, pruned, _ = tune_block(tmp_path / f"{len(tuned)}", list(tuned))
        moved[len(tuned)] = (block.get_submodule(name).weight - pruned[name]).abs().max().item()
    share = pruned[name].numel() / sum(weight.numel() for weight in pruned.values())
    assert moved[1] == pytest.approx(moved[len(LINEARS)] * share**0.5, rel=0.5)
    assert moved[1] < 0.8 * moved[len(LINEARS)]


def test_a_layer_that_is_2of4_already_keeps_every_byte_and_is_reported(llama: Path, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("method", ["magnitude", "reconstruct"])
def test_a_run_stopped_at_any_block_resumes_to_the_same_bytes(llama: Path, tmp_path: Path, method: str) -> None:
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
from tests.support.pruning import prune
kill = lambda stage, done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 2 else None
prune(Path(sys.argv[1]), Path(sys.argv[2]), method="reconstruct", work=Path(sys.argv[3]), progress=kill)
"""


def test_another_process_resumes_after_a_killed_one(llama: Path, tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    arguments = [sys.executable, "-c", KILLED, str(llama), str(out), str(work)]
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
