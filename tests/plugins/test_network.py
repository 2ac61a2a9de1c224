"""From ModelOpt's real exports to a TensorRT network on the stand-in: both checkpoint formats must give the same.

docs-llama is pruned, quantized and exported by the code that builds use, once as a unified checkpoint and once for
two ranks of TensorRT-LLM. What the torch engine makes of the first, the stand-in (tests/stand_in/README.md)
must make of the second, with its layers native and with them swapped for our plugin.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder import checkpoint
from builder.engines.torch_backend import artifact
from builder.engines.trtllm import checkpoint as trtllm_checkpoint
from builder.engines.trtllm import launch, tensorrt, version_lock
from builder.verify import verify
from plugins.autotune import tactics
from plugins.common.errors import UserError
from tests.support.network_exports import CONFIG, FORMATS, RANKS
from tests.support.pytorch_checkpoints import MODEL, ROOT, token_ids
from tests.support.stand_ins import STAND_IN

CHILD = """
import json, sys, threading, torch
from pathlib import Path
import tensorrt as trt
from tensorrt_llm._common import default_trtnet
from tensorrt_llm.mapping import Group
from tensorrt_llm.models import MODEL_MAP, PretrainedConfig
from plugins.tensorrt_llm.build_rank import MODEL_CLASS, load_hooks

def run(checkpoint, hooks, ranks):
    group, results, models = Group(ranks), [None] * ranks, []
    model_class = getattr(load_hooks(Path(hooks)), MODEL_CLASS) if hooks else MODEL_MAP["LlamaForCausalLM"]
    for rank in range(ranks):
        config = PretrainedConfig.from_json_file(Path(checkpoint) / "config.json")
        config.set_rank(rank)
        config.mapping.group = group
        models.append(model_class.from_checkpoint(checkpoint, config=config))
    default_trtnet().plugins = 0
    def forward(rank):
        with torch.inference_mode():
            results[rank] = models[rank](tokens)
    threads = [threading.Thread(target=forward, args=(rank,)) for rank in range(ranks)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return {"logits": results[0].float(), "plugins": default_trtnet().plugins}

tokens = torch.load(sys.argv[1])
torch.save([run(*job) for job in json.loads(sys.argv[2])], sys.argv[3])
"""


@pytest.fixture(scope="module")
def outputs(exports, tmp_path_factory):
    """{(format, on our plugin): the stand-in's logits and how many plugins it ran}."""
    scratch, jobs = tmp_path_factory.mktemp("network"), {}
    for number_format, directory in exports.items():
        jobs[number_format, False] = [str(directory / "trtllm"), None, RANKS]
        engine = scratch / number_format
        sparse_layers = trtllm_checkpoint.read(directory / "trtllm").sparse_layers
        tensorrt.prepare(directory / "trtllm", engine, CONFIG, ratios=dict.fromkeys(sparse_layers, 1.5))
        jobs[number_format, True] = [str(directory / "trtllm"), str(engine / "hooks/models.py"), RANKS]
    torch.save(token_ids(), scratch / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, scratch / "ids.pt", json.dumps(list(jobs.values())), scratch / "out.pt"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{STAND_IN}:{ROOT}", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(jobs, torch.load(scratch / "out.pt"), strict=True))


@pytest.mark.parametrize("number_format", FORMATS)
def test_both_ranks_of_a_tensor_parallel_export_verify(exports, number_format):
    verification = verify(exports[number_format] / "trtllm")
    assert verification.violations == ()
    actual = checkpoint.read(exports[number_format] / "trtllm")
    assert actual.mapping.ranks == RANKS
    assert len(actual.sparse_layers) == 6 * 5
    assert {layer.sparse for layer in actual.shapes() if layer.name in actual.sparse_layers} == {True}


@pytest.mark.parametrize("number_format", FORMATS)
def test_exported_config_has_the_rotary_base(exports, number_format):
    config = json.loads((exports[number_format] / "trtllm/config.json").read_text())
    assert config["rotary_base"] == 10000.0
    assert config["attn_bias"] is False
    config = json.loads((exports[number_format] / "hf/config.json").read_text())
    assert number_format == "none" or config["rope_theta"] == 10000.0  # transformers 4 looks here


def test_fused_layers_share_one_fp8_scale_so_that_nothing_is_rounded_twice(exports):
    hf = load_file(exports["fp8"] / "hf/model.safetensors")
    for rank in range(RANKS):
        trtllm = load_file(exports["fp8"] / f"trtllm/rank{rank}.safetensors")
        for block in range(6):
            names = [f"model.layers.{block}.self_attn.{part}_proj" for part in "qkv"]
            assert len({float(hf[f"{name}.weight_scale"]) for name in names}) == 1
            shards = [hf[f"{name}.weight"].view(torch.uint8).chunk(RANKS)[rank] for name in names]
            fused = trtllm[f"transformer.layers.{block}.attention.qkv.weight"].view(torch.uint8)
            assert torch.equal(torch.cat(shards), fused)  # both formats, bit by bit


@pytest.mark.parametrize("on_plugin", [False, True], ids=["native", "plugin"])
@pytest.mark.parametrize("number_format", FORMATS)
def test_network_gives_the_torch_engines_logits(exports, outputs, tmp_path, number_format, on_plugin):
    artifact.build(exports[number_format] / "hf", tmp_path / "torch", CONFIG)
    expected = artifact.load(tmp_path / "torch", dtype=torch.float32).logits(token_ids())
    actual = outputs[number_format, on_plugin]
    assert actual["plugins"] == (RANKS * 6 * 5 if on_plugin else 0)
    assert kl(expected, actual["logits"]) < 0.01  # bfloat16 against float32; and q, k and v share one scale in FP8


def kl(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Mean over tokens, in nats."""
    return float(
        torch.nn.functional.kl_div(actual.log_softmax(-1), expected.softmax(-1), reduction="none").sum(-1).mean()
    )


def test_the_measure_separates_pruned_from_dense(exports, outputs):
    dense = artifact.load_hf(MODEL, dtype=torch.float32).logits(token_ids())
    assert kl(dense, outputs["none", False]["logits"]) > 0.1  # or the tests around it show nothing


@pytest.mark.parametrize("number_format", FORMATS)
def test_plugin_and_native_layers_agree(outputs, number_format):
    assert kl(outputs[number_format, False]["logits"], outputs[number_format, True]["logits"]) < 0.01


def test_build_runs_every_rank_and_reports_what_was_picked(exports, tmp_path, with_stand_in):
    engine = tmp_path / "engine"
    tensorrt.build(exports["fp8"] / "trtllm", engine, CONFIG)
    assert {path.name for path in engine.glob("rank*.engine")} == {"rank0.engine", "rank1.engine"}
    facts = json.loads((engine / "engine.json").read_text())
    assert (facts["backend"], facts["format"], facts["kv_cache"]) == ("tensorrt", "fp8", "none")
    outputs = json.loads((engine / "sparsity_log.json").read_text())
    assert [rank["log"] for rank in outputs["ranks"]] == ["picked"] * RANKS
    assert {layer["status"] for layer in outputs["layers"].values()} == {"picked"}
    layers = tactics.read(engine).layers
    assert sum(layer.sparse for layer in layers.values()) == 6 * 5
    assert layers["lm_head"].reason.startswith("dense")
    assert (engine / "rank0-timing.cache").is_file()
    assert "timing a tactic" not in (engine / "build-rank1.log").read_text()
    locked = version_lock.read(engine)
    assert (locked.tensorrt_llm, locked.sm) == ("1.2.1", 90)
    assert (engine / "tokenizer.json").is_file()  # from the unified checkpoint beside it


def test_the_proof_does_not_hang_on_the_environments_log_level(exports, tmp_path, with_stand_in, monkeypatch):
    monkeypatch.setenv("TLLM_LOG_LEVEL", "ERROR")  # a level from the environment wins over the logger's set_level
    tensorrt.build(exports["fp8"] / "trtllm", tmp_path / "engine", CONFIG)
    assert {layer["status"] for layer in layers_of(tmp_path / "engine").values()} == {"picked"}


def layers_of(engine: Path) -> dict:
    return json.loads((engine / "sparsity_log.json").read_text())["layers"]


def test_layers_on_our_plugin_are_hidden_from_tensorrt(exports, tmp_path, with_stand_in, monkeypatch):
    engine, library = tmp_path / "engine", tmp_path / "libtwofour_tensorrt.so"
    library.write_bytes(b"")
    names = trtllm_checkpoint.read(exports["int8"] / "trtllm").sparse_layers
    tensorrt.build(exports["int8"] / "trtllm", engine, CONFIG, ratios=dict.fromkeys(names, 1.4), plugin=library)
    outputs = json.loads((engine / "sparsity_log.json").read_text())
    assert [rank["log"] for rank in outputs["ranks"]] == ["none"] * RANKS
    assert {layer["route"] for layer in outputs["layers"].values()} == {"plugin"}
    assert version_lock.read(engine).plugin_sha256 == hashlib.sha256(b"").hexdigest()
    version_lock.require(engine)  # with the copy of the library that lies in it
    (engine / launch.PLUGIN_LIBRARY).write_bytes(b"another")
    with pytest.raises(UserError, match="plugin library it was built with .here: another one."):
        version_lock.require(engine)
    (engine / launch.PLUGIN_LIBRARY).unlink()
    with pytest.raises(UserError, match="plugin library it was built with .here: missing."):
        version_lock.require(engine)
    monkeypatch.setenv("TWOFOUR_PLUGIN_LIBRARY", str(library))  # as launch/env.sh takes it
    version_lock.require(engine)


def write_stages(source: Path, out: Path) -> Path:
    """A checkpoint of two tensor-parallel ranks, as one of two pipeline stages. The halves of a layer are laid together
    without regard to q, k and v: nothing here is multiplied."""
    ranks = [load_file(source / f"rank{rank}.safetensors") for rank in range(RANKS)]
    stages = [{}, {}]
    for name, first in ranks[0].items():
        axis = 1 if name.split(".")[-2] in ("dense", "proj") else 0
        whole = first if first.ndim == 1 else torch.cat([rank[name] for rank in ranks], axis)
        block = name.split(".")[2] if ".layers." in name else {"vocab_embedding": 0}.get(name.split(".")[1], 5)
        stage, local = divmod(int(block), 3)
        stages[stage][name.replace(f".layers.{block}.", f".layers.{local}.")] = whole.contiguous()
    shutil.copytree(source, out)
    for number, stage in enumerate(stages):
        save_file(stage, out / f"rank{number}.safetensors")
    config = json.loads((source / "config.json").read_text())
    config["mapping"] = {"world_size": 2, "tp_size": 1, "pp_size": 2}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_pipeline_stages_take_their_own_layers(exports, tmp_path, with_stand_in):
    """Two stages of three blocks: each has files and layers that are numbered from 0, and routes that are not."""
    engine, library = tmp_path / "engine", tmp_path / "libtwofour_tensorrt.so"
    library.write_bytes(b"")
    staged = write_stages(exports["none"] / "trtllm", tmp_path / "trtllm")
    names = trtllm_checkpoint.read(staged).sparse_layers
    config = CONFIG.model_copy(update={"tensor_parallel": 1, "pipeline_parallel": 2})
    plugged = dict.fromkeys([name for name in names if name.endswith("mlp.proj")], 1.4)
    tensorrt.build(staged, engine, config, tokenizer=MODEL, ratios=plugged, plugin=library)
    outputs = layers_of(engine)
    assert {name for name, layer in outputs.items() if layer["route"] == "plugin"} == set(plugged)
    assert {layer["status"] for layer in outputs.values()} == {"picked"}
