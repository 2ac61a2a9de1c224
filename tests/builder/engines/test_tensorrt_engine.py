"""The tensorrt backend without TensorRT: what is prepared, what is rejected and the errors, and failing ranks."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from builder.config import EngineConfig
from builder.engines import measured_tactics
from builder.engines.trtllm import checkpoint as trtllm_checkpoint
from builder.engines.trtllm import gpu_memory, tensorrt, version_lock
from plugins.common.errors import UserError
from plugins.common.nvidia_smi import Gpu
from plugins.tensorrt_llm import releases
from tests.support.stand_in_checkpoint import LAYERS, write_checkpoint

CONFIG = EngineConfig(backend="tensorrt", max_batch_size=8, max_seq_len=512, max_num_tokens=1024)


H100 = Gpu("NVIDIA H100 80GB HBM3", 90, 80 << 30, 79 << 30, "580.1")


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_sparse_build_keeps_gemm_plugins_off_and_asks_for_sparsity(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "trtllm")
    command = tensorrt.build_command(checkpoint, tmp_path / "engine", CONFIG, sparse=True)
    assert "--weight_sparsity" in command
    assert option(command, "--gemm_plugin") == "disable"
    assert option(command, "--model_cls_file") == str(tmp_path / "engine/hooks/models.py")
    assert "--fast_build" not in command  # managed weights would hide the pattern as a plugin does
    assert option(command, "--log_level") == "verbose"


def test_dense_16_bit_build_takes_the_gemm_plugin_and_no_sparsity(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "trtllm", sparse=False, quant_algo=None)
    command = tensorrt.build_command(checkpoint, tmp_path / "engine", CONFIG, sparse=False)
    assert option(command, "--gemm_plugin") == "auto"
    assert "--weight_sparsity" not in command
    assert "--model_cls_file" not in command


def test_int8_never_meets_a_gemm_plugin_or_a_fused_mlp(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "trtllm", sparse=False, quant_algo="W8A8_SQ_PER_CHANNEL")
    command = tensorrt.build_command(checkpoint, tmp_path / "engine", CONFIG, sparse=False)
    assert option(command, "--gemm_plugin") == "disable"
    assert option(command, "--use_fused_mlp") == "disable"


def test_a_layer_goes_to_our_plugin_only_where_it_measured_faster(tmp_path):
    actual = trtllm_checkpoint.read(write_checkpoint(tmp_path))
    chosen = tensorrt.routes(actual, {LAYERS[0]: 1.3, LAYERS[1]: 0.9})
    assert chosen[LAYERS[0]] == "plugin"
    assert {chosen[layer] for layer in LAYERS[1:]} == {"native"}
    assert tensorrt.build_config(actual, CONFIG, chosen)["plugin_config"]["use_fused_mlp"]
    swapped = tensorrt.routes(actual, dict.fromkeys(LAYERS, 2.0))
    settings = tensorrt.build_config(actual, CONFIG, swapped)
    assert not settings["plugin_config"]["use_fused_mlp"]  # fusing would throw the swapped layers away
    assert not settings["weight_sparsity"]
    mixed = tensorrt.routes(actual, dict.fromkeys(LAYERS, 2.0), picked=LAYERS[:2])
    assert [mixed[layer] for layer in LAYERS[:3]] == [
        "native",
        "native",
        "plugin",
    ]  # TensorRT's own sparse tactic stays


def test_measured_ratios_count_only_where_a_sparse_kernel_was_kept_at_the_engines_batch():
    def layer(*buckets):
        named = ("tokens", "kernel", "ratio", "measured")
        return {"buckets": [dict(zip(named, bucket, strict=True)) for bucket in buckets]}

    tactics = {
        "layers": {
            "faster": layer((8, "skinny", 1.4, True), (64, "dense-cublaslt", 0.9, True)),
            "slower": layer((8, "dense-cublaslt", 0.8, True)),
            "predicted": layer((8, "skinny", 1.4, False)),
            "unfit": layer((8, "reference", None, True)),
        }
    }
    assert measured_tactics.ratios(tactics, 8) == {"faster": 1.4}
    assert measured_tactics.ratios(tactics, 9) == {}  # at 64 tokens dense was kept
    assert measured_tactics.measure([], CONFIG, "bf16") == {}  # no GPU here: nothing is claimed


@pytest.mark.parametrize(
    ("weights", "cache", "paged"),
    [("FP8", None, True), ("FP8", "FP8", True), ("FP8", "INT8", False), (None, "FP8", False), (None, None, True)],
)
def test_block_reuse_and_chunked_prefill_only_where_prompts_can_read_the_paged_cache(tmp_path, weights, cache, paged):
    quantization = {"quant_algo": weights, "kv_cache_quant_algo": cache}
    checkpoint = write_checkpoint(tmp_path / "trtllm", quantization=quantization)
    command = tensorrt.prepare(checkpoint, tmp_path / "engine", CONFIG)
    assert option(command, "--use_paged_context_fmha") == ("enable" if paged else "disable")
    args = yaml.safe_load((tmp_path / "engine/llm_args.yaml").read_text())
    assert args["kv_cache_config"]["enable_block_reuse"] == paged
    chunked = CONFIG.model_copy(update={"chunked_prefill": True})
    if paged:
        tensorrt.prepare(checkpoint, tmp_path / "chunked", chunked)
    else:
        with pytest.raises(UserError, match=r"engine\.chunked_prefill is not possible with quantization\.kv_cache="):
            tensorrt.prepare(checkpoint, tmp_path / "chunked", chunked)


def test_prepare_writes_all_that_needs_no_gpu(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "trtllm")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/tokenizer.json").write_text("{}")
    out = tmp_path / "engine"
    command = tensorrt.prepare(checkpoint, out, CONFIG)
    assert command == tensorrt.build_command(checkpoint, out, CONFIG, sparse=True)
    assert not (out / "engine.json").exists()  # it is not an engine yet
    assert (out / "tokenizer.json").is_file()
    assert json.loads((out / "hooks/routes.json").read_text())["layers"] == dict.fromkeys(LAYERS, "native")
    compile((out / "hooks/models.py").read_text(), "models.py", "exec")
    assert os.access(out / "build.sh", os.X_OK)


def test_build_script_runs_the_same_command_wherever_the_artifact_lies(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "made" / "checkpoint-trtllm")
    command = tensorrt.prepare(checkpoint, tmp_path / "made" / "engine", CONFIG)
    moved = tmp_path / "somewhere else"
    (tmp_path / "made").rename(moved)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "trtllm-build").write_text('#!/bin/sh\nprintf "%s\\n" trtllm-build "$@"\necho "PYTHONPATH=$PYTHONPATH"\n')
    (tools / "trtllm-build").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run([moved / "engine/build.sh"], capture_output=True, text=True, env=environment, check=True)
    *arguments, path = done.stdout.splitlines()
    made, now = str(tmp_path / "made/engine"), str(moved / "engine")
    expected = [word.replace(made, now).replace(str(checkpoint), f"{now}/../checkpoint-trtllm") for word in command]
    assert arguments == expected
    assert path.startswith(f"PYTHONPATH={now}/hooks")  # trtllm-build's workers import `models` from here


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"architecture": "Gemma9ForCausalLM"}, "'Gemma9ForCausalLM' is not an architecture"),
        ({"dtype": "float64"}, "dtype 'float64'"),
        ({"rotary_base": None}, "has no rotary_base"),
        ({"mapping": None}, "without 'mapping'"),
        ({"quantization": {"quant_algo": "FP8", "sparsity": "2:4"}}, "quantization key 'sparsity'"),
        (
            {"quantization": {"quant_algo": "NVFP9"}, "producer": {"name": "modelopt", "version": "1.3.0"}},
            "quant_algo 'NVFP9', not one of W8A8_SQ_PER_CHANNEL, FP8: it was written by modelopt 1.3.0",
        ),
    ],
)
def test_bad_config_is_refused_in_one_line(tmp_path, changes, fragment):
    checkpoint = write_checkpoint(tmp_path, **changes)
    with pytest.raises(UserError, match=fragment) as refused:
        trtllm_checkpoint.read(checkpoint)
    assert "\n" not in str(refused.value)


def test_missing_rank_is_named(tmp_path):
    write_checkpoint(tmp_path, mapping={"world_size": 2, "tp_size": 2, "pp_size": 1})
    (tmp_path / "rank1.safetensors").unlink()
    with pytest.raises(UserError, match=r"lacks rank1\.safetensors of 2 ranks"):
        trtllm_checkpoint.read(tmp_path)


def test_hugging_face_checkpoint_in_its_place_is_recognised(docs_llama_like):
    with pytest.raises(UserError, match="is a Hugging Face checkpoint: give the TensorRT-LLM checkpoint"):
        trtllm_checkpoint.read(docs_llama_like)


@pytest.fixture
def docs_llama_like() -> Path:
    return Path(__file__).parents[3] / "examples" / "docs-llama"


def test_checkpoint_split_for_other_ranks_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "t", mapping={"world_size": 2, "tp_size": 2, "pp_size": 1})
    with pytest.raises(UserError, match=r"exported for tensor_parallel 2 and engine\.tensor_parallel is 1"):
        tensorrt.prepare(checkpoint, tmp_path / "engine", CONFIG)


def test_int8_on_blackwell_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    checkpoint = write_checkpoint(tmp_path / "t", quant_algo="W8A8_SQ_PER_CHANNEL")
    monkeypatch.setattr(tensorrt, "gpus", lambda: (Gpu("NVIDIA B200", 100, 180 << 30, 170 << 30, "580.1"),))
    with pytest.raises(UserError, match="SmoothQuant INT8 on SM100"):
        tensorrt.prepare(checkpoint, tmp_path / "engine", CONFIG)
    assert not (tmp_path / "engine").exists()


def test_build_without_tensorrt_llm_names_what_is_missing_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(version_lock, "installed", lambda name: None)
    with pytest.raises(UserError) as refused:
        tensorrt.build(write_checkpoint(tmp_path / "t"), tmp_path / "engine", CONFIG)
    assert str(refused.value).startswith(
        "engine.backend=tensorrt needs the package tensorrt_llm, which is not installed"
    )
    assert releases.CONTAINER in str(refused.value)
    assert "\n" not in str(refused.value)


def test_build_without_a_gpu_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(version_lock, "installed", lambda name: "1.2.1")
    monkeypatch.setattr(tensorrt, "gpus", lambda: ())
    with pytest.raises(UserError, match="needs a GPU, and there is none"):
        tensorrt.build(write_checkpoint(tmp_path / "t"), tmp_path / "engine", CONFIG)


def test_missing_plugin_library_is_named_before_the_build(tmp_path, monkeypatch):
    monkeypatch.setattr(version_lock, "installed", lambda name: "1.2.1")
    monkeypatch.setattr(tensorrt, "gpus", lambda: (H100,))
    with pytest.raises(UserError, match=r"plugin library libtwofour_tensorrt\.so is missing at .*nowhere"):
        tensorrt.build(
            write_checkpoint(tmp_path / "t"),
            tmp_path / "engine",
            CONFIG,
            ratios={LAYERS[0]: 1.5},
            plugin=tmp_path / "nowhere.so",
        )


def test_memory_is_refused_before_with_the_figures():
    model = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80,
             "intermediate_size": 28672, "vocab_size": 128256}  # fmt: skip
    need = gpu_memory.estimate(model, 141 << 30, "none", CONFIG)
    with pytest.raises(
        UserError, match=r"has 79\.0 GiB free and the engine needs about \d+\.\d GiB \(weights 141\.0\)"
    ):
        gpu_memory.require(need, [H100], 1)
    four = EngineConfig(tensor_parallel=4)
    gpu_memory.require(gpu_memory.estimate(model, 141 << 30, "none", four), [H100] * 4, 4)


def test_kv_cache_estimate_counts_every_head_and_halves_for_8_bit():
    model = {
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 6,
        "head_size": 64,
    }
    need = gpu_memory.estimate(model, 0, "none", CONFIG)
    assert need.kv_cache == 2 * 6 * 2 * 64 * 2 * 8 * 512
    assert gpu_memory.estimate(model, 0, "fp8", CONFIG).kv_cache == need.kv_cache // 2


def test_fewer_gpus_than_ranks_is_refused_when_serving():
    with pytest.raises(UserError, match="needs 2 GPUs and this machine has 1"):
        gpu_memory.require(gpu_memory.Estimate(0, 0, 0), [H100], 2)
