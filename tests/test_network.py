"""From ModelOpt's real exports to a TensorRT network on the stand-in: both checkpoint formats must say the same.

docs-llama is pruned, quantized and exported by the code that builds use, once as a unified checkpoint and once for
two ranks of TensorRT-LLM. What the torch engine makes of the first, the stand-in (tests/stand_in/README.md)
must make of the second, with its layers native and with them swapped for our plugin.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_pytorch_backend import LINEARS, MODEL, ROOT, STAND_IN, prune, token_ids

from builder import checkpoint
from builder.engines import tensorrt, torch_engine, trtllm_checkpoint
from builder.engines.base import EngineConfig
from plugins.tensorrt_llm import inspector

FORMATS = ("none", "fp8", "int8")
RANKS = 2
CONFIG = EngineConfig(backend="tensorrt", max_batch_size=4, max_seq_len=128, tensor_parallel=RANKS)

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
def exports(tmp_path_factory):
    """{format: directory with hf/ and trtllm/}, written by calibration's own code."""
    from calibration import export
    from calibration.config import Quantization
    from calibration.quantize import load_model, quantize

    layers = [f"model.layers.{i}.{'self_attn' if n in LINEARS[:4] else 'mlp'}.{n}" for i in range(6) for n in LINEARS]
    sparse = {"pattern": "2:4", "method": "magnitude", "layers": layers}
    root, found = tmp_path_factory.mktemp("exports"), {}
    for number_format in FORMATS:
        model = load_model(MODEL)
        with torch.no_grad():
            for name in layers:
                weight = model.get_submodule(name).weight
                weight.copy_(prune(weight))
        out = root / number_format
        if number_format != "none":
            model = quantize(model, Quantization(format=number_format), layers, token_ids().numpy())
        export.export_trtllm(model, MODEL, out / "trtllm", sparse, RANKS, 1)
        if number_format == "none":
            model.save_pretrained(out / "hf")
            export.copy_tokenizer(MODEL, out / "hf")
            export.write_sparsity(out / "hf", sparse)
        else:
            export.export_hf(model, MODEL, out / "hf", sparse)
        found[number_format] = out
    return found


@pytest.fixture(scope="module")
def told(exports, tmp_path_factory):
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
    verification = checkpoint.verify(exports[number_format] / "trtllm")
    assert verification.violations == ()
    found = checkpoint.read(exports[number_format] / "trtllm")
    assert found.mapping.ranks == RANKS
    assert len(found.sparse_layers) == 6 * 5
    assert {layer.sparse for layer in found.layers() if layer.name in found.sparse_layers} == {True}


@pytest.mark.parametrize("number_format", FORMATS)
def test_exported_config_says_the_rotary_base(exports, number_format):
    config = json.loads((exports[number_format] / "trtllm/config.json").read_text())
    assert config["rotary_base"] == 10000.0
    assert config["attn_bias"] is False


@pytest.mark.parametrize("on_plugin", [False, True], ids=["native", "plugin"])
@pytest.mark.parametrize("number_format", FORMATS)
def test_network_says_what_the_torch_engine_says(exports, told, tmp_path, number_format, on_plugin):
    torch_engine.build(exports[number_format] / "hf", tmp_path / "torch", CONFIG)
    expected = torch_engine.load(tmp_path / "torch", dtype=torch.float32).logits(token_ids())
    found = told[number_format, on_plugin]
    assert found["plugins"] == (RANKS * 6 * 5 if on_plugin else 0)
    assert kl(expected, found["logits"]) < 0.01  # bfloat16 against float32; and q, k and v share one scale in FP8


def kl(expected: torch.Tensor, found: torch.Tensor) -> float:
    """Mean over tokens, in nats."""
    return float(
        torch.nn.functional.kl_div(found.log_softmax(-1), expected.softmax(-1), reduction="none").sum(-1).mean()
    )


def test_the_measure_tells_pruned_from_dense(exports, told):
    dense = torch_engine.load_hf(MODEL, dtype=torch.float32).logits(token_ids())
    assert kl(dense, told["none", False]["logits"]) > 0.1  # or the tests around it show nothing


@pytest.mark.parametrize("number_format", FORMATS)
def test_plugin_and_native_layers_agree(told, number_format):
    assert kl(told[number_format, False]["logits"], told[number_format, True]["logits"]) < 0.01


def child(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{STAND_IN}:{ROOT}"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    ).stderr


def test_missing_plugin_library_is_said_with_what_to_preload():
    code = "import tensorrt; tensorrt.get_plugin_registry().preloaded = False\n"
    code += "from plugins.tensorrt_llm.network import add_plugin; add_plugin(None, None, None)"
    assert "TensorRT knows no plugin TwofourGemm: preload libtwofour_tensorrt.so" in child(code)


def test_layer_that_the_model_lacks_is_refused(exports):
    code = f"""
from tensorrt_llm.models import LLaMAForCausalLM, PretrainedConfig
from plugins.tensorrt_llm.network import swap
config = PretrainedConfig.from_json_file({str(exports["fp8"] / "trtllm/config.json")!r})
swap(LLaMAForCausalLM(config), {{"transformer.layers.0.mlp.fused_fc"}})
"""
    assert "'transformer.layers.0.mlp.fused_fc' is no layer in this model" in child(code)


def test_inspector_names_sparse_tactics_by_module():
    layers = [
        {
            "Name": "LLaMAForCausalLM/transformer/layers/0/mlp/proj/MATRIX_MULTIPLY_0",
            "TacticName": "sm80_xmma_sparse_gemm_x",
        },
        {"Name": "__myl_Fc_7", "Metadata": "[x: transformer/layers/1/attention/qkv/MM_0]", "TacticName": "sm90_spgemm"},
        {"Name": "transformer/layers/2/attention/qkv/MM_0", "TacticName": "sm80_xmma_gemm_bf16"},
    ]
    found = inspector.parse(json.dumps({"Layers": layers}))
    assert [tactic.is_of("transformer.layers.0.mlp.proj") for tactic in found] == [True, False]
    assert found[1].is_of("transformer.layers.1.attention.qkv")
    assert not any(tactic.is_of("transformer.layers.2.attention.qkv") for tactic in found)


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": ["only names"]}', '{"Layers": [{"Name": "x"}]}'])
def test_inspector_without_tactics_says_nothing(text):
    assert inspector.parse(text) is None


def test_settings_of_two_ranks_share_no_timing_cache(tmp_path):
    from plugins.tensorrt_llm.build_rank import settings

    (tmp_path / "build_config.json").write_text(json.dumps({"input_timing_cache": "t", "output_timing_cache": "t"}))
    assert settings(tmp_path, 0)["output_timing_cache"] != settings(tmp_path, 1)["output_timing_cache"]
    assert Path(settings(tmp_path, 0)["output_timing_cache"]).parent == tmp_path
