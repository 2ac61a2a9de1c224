"""The pytorch backend: what is written, and our module's whole logic on the stand-in (see tests/stand_in/README.md).

The stand-in is imported under TensorRT-LLM's name in a process of its own, so that no other test ever sees it.
"""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.engines.torch_backend import artifact
from builder.engines.trtllm import pytorch, sparse_package
from tests.support import stand_ins
from tests.support.pytorch_checkpoints import (
    CONFIG,
    WIDE,
    token_ids,
)
from tests.support.stand_ins import environment, job


@pytest.fixture(scope="module")
def torch_logits(checkpoints, tmp_path_factory):
    """The torch engine's logits of each checkpoint, float32."""
    actual = {}
    for kind, checkpoint in checkpoints.items():
        engine = tmp_path_factory.mktemp("torch-engine")
        artifact.build(checkpoint, engine, CONFIG)
        actual[kind] = artifact.load(engine, dtype=getattr(torch, WIDE[kind[0]])).logits(token_ids())
    return actual


@pytest.fixture(scope="module")
def outputs(checkpoints, tmp_path_factory):
    """What the stand-in made of every (fp8, sparse, ranks)."""
    scratch, jobs = tmp_path_factory.mktemp("stand-in"), {}
    for (fp8, sparse), checkpoint in checkpoints.items():
        for ranks in (1, 2):
            engine = scratch / f"{fp8}-{sparse}-{ranks}"
            pytorch.build(checkpoint, engine, CONFIG.model_copy(update={"tensor_parallel": ranks}))
            jobs[fp8, sparse, ranks] = job(engine, ranks, WIDE[fp8])
    return dict(zip(jobs, stand_ins.load(scratch, token_ids(), *jobs.values()), strict=True))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "2of4"])
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_same_logits_as_the_torch_engine(outputs, torch_logits, fp8, sparse, ranks):
    actual, expected = outputs[fp8, sparse, ranks], torch_logits[fp8, sparse]
    assert (actual["logits"] - expected).abs().max() < (1e-5 if fp8 else 1e-4)
    methods = {name: method for name, method in actual["methods"].items() if name != "lm_head"}
    base = "FP8{}LinearMethod" if fp8 else "{}LinearMethod"
    stock, ours = base.format("QDQ" if fp8 else "Unquantized"), "Sparse" + base.format("")
    assert set(methods.values()) == {ours if sparse else stock}
    assert actual["methods"]["lm_head"] == "UnquantizedLinearMethod"


def test_torch_engine_gives_other_logits_for_pruned_weights(torch_logits):
    assert (torch_logits[False, True] - torch_logits[False, False]).abs().max() > 1  # or the test above shows nothing


def test_dense_weights_are_freed_and_the_log_counts_them(outputs):
    actual = outputs[True, True, 1]
    kept = {name for (rank, name), count in actual["dense_elements"].items() if count}
    assert kept == {"lm_head"}
    assert any("42 of 42 declared 2:4 layers have the sparse method" in line for line in actual["log"])


def test_fused_layer_is_sparse_only_where_each_of_its_parts_is(checkpoints, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in checkpoints[False, True].iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    declared = json.loads((checkpoint / "sparsity.json").read_text())
    declared["layers"].remove("model.layers.0.self_attn.k_proj")
    (checkpoint / "sparsity.json").write_text(json.dumps(declared))
    pytorch.build(checkpoint, tmp_path / "engine", CONFIG)
    (outputs,) = stand_ins.load(tmp_path, token_ids(), job(tmp_path / "engine"))
    assert outputs["methods"]["model.layers.0.self_attn.qkv_proj"] == "UnquantizedLinearMethod"
    assert outputs["methods"]["model.layers.1.self_attn.qkv_proj"] == "SparseLinearMethod"
    assert any(
        "2 declared 2:4 layers stay dense, such as model.layers.0.self_attn.q_proj" in line for line in outputs["log"]
    )


def test_weight_that_is_not_2of4_stops_the_worker_instead_of_computing_wrongly(checkpoints, tmp_path):
    engine = tmp_path / "engine"
    pytorch.build(checkpoints[False, True], engine, CONFIG)
    tensors = load_file(engine / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][5, :4] = 1.0
    (engine / "model.safetensors").unlink()
    save_file(tensors, engine / "model.safetensors")
    with pytest.raises(AssertionError, match="row 5"):
        stand_ins.load(tmp_path, token_ids(), job(engine))


def test_shard_that_cuts_a_group_is_refused_by_the_module_too():
    code = """
from types import SimpleNamespace
from tensorrt_llm._torch.modules.linear import UnquantizedLinearMethod
from plugins.tensorrt_llm.sparse_method import give_sparse_method
module = SimpleNamespace(quant_method=UnquantizedLinearMethod(), in_features=6)
give_sparse_method("model.layers.0.mlp.down_proj", module, ())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=False)
    assert "'model.layers.0.mlp.down_proj' has 6 inputs on this rank, which cuts a 2:4 group of 4" in done.stderr


def test_the_models_class_reaches_a_worker_both_ways_that_it_may_travel(checkpoints, tmp_path):
    """1.2 pickles the registry's classes, later releases send the name of a class's module: workers import it by that
    name, from the PYTHONPATH that launch/env.sh sets."""
    engine = tmp_path / "engine"
    pytorch.build(checkpoints[True, True], engine, CONFIG)
    driver = """
import importlib, pickle, sys
from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING
sys.path.insert(0, sys.argv[1])  # as --custom_module_dirs does
importlib.import_module(sys.argv[2])
cls = MODEL_CLASS_MAPPING["LlamaForCausalLM"]
print(pickle.dumps(cls).hex(), cls.__module__)
"""
    fragment = [sys.executable, "-c", driver, str(engine), sparse_package.NAME]
    done = subprocess.run(fragment, capture_output=True, text=True, env=environment(), check=True)
    pickled, module = done.stdout.split()
    worker = """
import importlib, pickle, sys
from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING
pickle.loads(bytes.fromhex(sys.argv[1])) if sys.argv[1] != "-" else importlib.import_module(sys.argv[2])
print([base.__name__ for base in MODEL_CLASS_MAPPING["LlamaForCausalLM"].mro()][:3])
"""
    for given in (pickled, "-"):
        command = f"source '{engine}/launch/env.sh' && exec '{sys.executable}' -c \"$0\" \"$@\""
        fragment = ["bash", "-c", command, worker, given, module]
        done = subprocess.run(fragment, capture_output=True, text=True, env=environment(), check=False)
        assert done.stdout.strip() == "['LlamaForCausalLM', 'SparseLinears', 'LlamaForCausalLM']", done.stderr
