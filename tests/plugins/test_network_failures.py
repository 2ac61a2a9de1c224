"""Ranks that fail, missing libraries, and inspectors without results."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from builder.engines.trtllm import tensorrt
from plugins.common.errors import UserError
from plugins.tensorrt_llm import inspector
from tests.support.network_exports import CONFIG
from tests.support.pytorch_checkpoints import ROOT
from tests.support.stand_ins import STAND_IN


def test_rank_that_fails_is_named_with_its_cause(exports, tmp_path, with_stand_in, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where the failed rank's log is kept
    broken = tmp_path / "trtllm"
    shutil.copytree(exports["fp8"] / "trtllm", broken)
    tensors = load_file(broken / "rank1.safetensors")
    del tensors["transformer.layers.3.mlp.proj.weight"]
    save_file(tensors, broken / "rank1.safetensors")
    with pytest.raises(UserError, match=r"rank 1 ended with status 1, 'Required but not provided tensors.*mlp\.proj"):
        tensorrt.build(broken, tmp_path / "engine", CONFIG)
    assert not (tmp_path / "engine/tactics.json").exists()


REFUSALS = """
import sys, tensorrt
from plugins.common.errors import UserError
from plugins.tensorrt_llm.network import add_plugin, swap
from tensorrt_llm.models import LLaMAForCausalLM, PretrainedConfig
tensorrt.get_plugin_registry().preloaded = False
model = LLaMAForCausalLM(PretrainedConfig.from_json_file(sys.argv[1]))
for refused in (lambda: add_plugin(None, None, None), lambda: swap(model, {"transformer.layers.0.mlp.fused_fc"})):
    try:
        refused()
    except UserError as error:
        print(error)
"""


def test_missing_plugin_library_and_unknown_layer_are_rejected(exports):
    config = str(exports["fp8"] / "trtllm/config.json")
    environment = {**os.environ, "PYTHONPATH": f"{STAND_IN}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", REFUSALS, config], capture_output=True, text=True, env=environment, check=True
    )
    missing, unknown = done.stdout.splitlines()
    assert missing.startswith("TensorRT has no plugin TwofourGemm: preload libtwofour_tensorrt.so")
    assert unknown.startswith("'transformer.layers.0.mlp.fused_fc' is not a layer in this model")


def test_inspector_names_sparse_tactics_by_module():
    layers = [
        {
            "Name": "LLaMAForCausalLM/transformer/layers/0/mlp/proj/MATRIX_MULTIPLY_0",
            "TacticName": "sm80_xmma_sparse_gemm_x",
        },
        {"Name": "__myl_Fc_7", "Metadata": "[x: transformer/layers/1/attention/qkv/MM_0]", "TacticName": "sm90_spgemm"},
        {"Name": "transformer/layers/2/attention/qkv/MM_0", "TacticName": "sm80_xmma_gemm_bf16"},
    ]
    actual = inspector.parse(json.dumps({"Layers": layers}))
    assert [tactic.is_of("transformer.layers.0.mlp.proj") for tactic in actual] == [True, False]
    assert actual[1].is_of("transformer.layers.1.attention.qkv")
    assert not any(tactic.is_of("transformer.layers.2.attention.qkv") for tactic in actual)


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": ["only names"]}', '{"Layers": [{"Name": "x"}]}'])
def test_inspector_without_tactics_gives_no_result(text):
    assert inspector.parse(text) is None


def test_settings_of_two_ranks_share_no_timing_cache(tmp_path):
    from plugins.tensorrt_llm.build_rank import settings

    (tmp_path / "build_config.json").write_text(json.dumps({"input_timing_cache": "t", "output_timing_cache": "t"}))
    assert settings(tmp_path, 0)["output_timing_cache"] != settings(tmp_path, 1)["output_timing_cache"]
    assert Path(settings(tmp_path, 0)["output_timing_cache"]).parent == tmp_path
