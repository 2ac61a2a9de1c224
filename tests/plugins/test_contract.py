"""Every field, flag and key that we hand to TensorRT-LLM is one that it has, by tests/data/tensorrt_llm.json.

The package itself cannot be installed here. The file was read from its public sources of 1.1 to 1.3rc; what it marks
with `since` is not in every release, and we emit none of it.
"""

import ast
import itertools
import json
import shlex
from pathlib import Path

import pytest
import yaml

from builder.engines.base import EngineConfig
from builder.engines.trtllm import artifact, pytorch, tensorrt
from builder.engines.trtllm import checkpoint as trtllm_checkpoint
from calibration.quantization.trtllm_config import complete_config
from tests.support.stand_in_checkpoint import CONFIG, LAYERS, write_checkpoint

CONTRACT = json.loads((Path(__file__).parents[1] / "data" / "tensorrt_llm.json").read_text())
TYPES = {"int": int, "bool": bool, "str": str, "float": (int, float)}
LLAMA_KEYS = {"mlp_bias", "attn_bias", "rotary_base", "rotary_scaling"}  # of LLaMAConfig and QWenConfig
QWEN_KEYS = {"qwen_type", "seq_length"}
PARALLEL = {"world_size": 2, "tp_size": 2, "pp_size": 1}


def everything_buildable(tmp_path):
    """(TensorRT-LLM checkpoint, config, routes) of every kind that we build."""
    kinds = itertools.product(("FP8", "W8A8_SQ_PER_CHANNEL", None), (True, False), (1, 2), ("native", "plugin"))
    for number, (algorithm, sparse, parallel, route) in enumerate(kinds):
        mapping = PARALLEL if parallel == 2 else CONFIG["mapping"]
        checkpoint = write_checkpoint(tmp_path / str(number), sparse, algorithm, mapping=mapping)
        config = EngineConfig(backend="tensorrt", tensor_parallel=parallel, chunked_prefill=True)
        ratios = dict.fromkeys(LAYERS, 2.0 if route == "plugin" else 0.5)
        yield checkpoint, config, tensorrt.routes(trtllm_checkpoint.read(checkpoint), ratios)


def matches(value, kind: str) -> bool:
    """Whether a JSON value fits the contract's type, such as `Optional[Literal["auto",None]]`."""
    if value is None:
        return "Optional" in kind or "None" in kind
    if "Literal" in kind:
        return f'"{value}"' in kind
    name = kind.removeprefix("Optional[").rstrip("]")
    return isinstance(value, TYPES[name]) and (name == "bool") == isinstance(value, bool)


def test_build_config_fields_and_values_are_in_the_contract(tmp_path):
    for checkpoint, config, routes in everything_buildable(tmp_path):
        settings = tensorrt.build_config(trtllm_checkpoint.read(checkpoint), config, routes)
        plugin_config = settings.pop("plugin_config")
        for fields, known in ((settings, CONTRACT["BuildConfig"]), (plugin_config, CONTRACT["PluginConfig"])):
            for name, value in fields.items():
                assert name in known
                assert "since" not in known[name]
                assert matches(value, known[name]["type"]), (name, value, known[name]["type"])
                assert value in known[name].get("choices", [value])


def test_every_flag_of_the_build_command_is_in_the_contract(tmp_path):
    for checkpoint, config, routes in everything_buildable(tmp_path):
        out = tmp_path / "engine"
        ratios = {layer: 2.0 for layer, route in routes.items() if route == "plugin"}
        command = tensorrt.prepare(checkpoint, out, config, ratios=ratios)
        assert command[0] == "trtllm-build"
        check_flags(command, CONTRACT["trtllm-build"], set(CONTRACT["trtllm-build_store_true"]))
        gemm = command[command.index("--gemm_plugin") + 1]
        assert gemm in CONTRACT["trtllm-build_gemm_plugin_choices"]
        features = [f"--{name}" for name, field in CONTRACT["PluginConfig"].items() if field["type"] == "bool"]
        assert all(command[command.index(f) + 1] in ("enable", "disable") for f in features if f in command)


def check_flags(words, known, switches=frozenset()):
    """Every option is known, once, and has one value exactly where it takes one."""
    options = [word for word in words if word.startswith("-")]
    assert sorted(set(options)) == sorted(options)
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("-"):
            assert word in known
            assert following.startswith("-") == (word in switches)


def test_gemm_plugin_is_off_wherever_native_sparse_tactics_are_wanted(tmp_path):
    for checkpoint, config, routes in everything_buildable(tmp_path):
        settings = tensorrt.build_config(trtllm_checkpoint.read(checkpoint), config, routes)
        assert settings["weight_sparsity"] == ("native" in routes.values())
        if "native" in routes.values():
            hiding = ("gemm_plugin", "low_latency_gemm_plugin", "gemm_swiglu_plugin", "manage_weights")
            defaults = {name: CONTRACT["PluginConfig"][name]["default"] for name in hiding}
            assert not any((defaults | settings["plugin_config"])[name] for name in hiding)


@pytest.mark.parametrize("backend", ["tensorrt", "pytorch"])
def test_llm_args_keys_are_in_the_contract(backend):
    known = CONTRACT["BaseLlmArgs"] | CONTRACT["TorchLlmArgs" if backend == "pytorch" else "TrtLlmArgs"]
    for graphs, cache, chunked in itertools.product((True, False), ("none", "fp8"), (True, False)):
        config = EngineConfig(cuda_graphs=graphs, chunked_prefill=chunked, tensor_parallel=2)
        args = artifact.llm_args(config, backend, cache)
        for name, field in ((name, known[name]) for name in args):
            assert "since" not in field, name
        for name, value in args["kv_cache_config"].items():
            assert "since" not in CONTRACT["KvCacheConfig"][name]
            assert matches(value, CONTRACT["KvCacheConfig"][name]["type"])
        if backend == "tensorrt":
            assert "dtype" not in args["kv_cache_config"]  # must be "auto" there
            assert "cuda_graph_config" not in args


def test_recipe_keys_reach_llm_args():
    config = EngineConfig(kv_cache_block_reuse=False, cuda_graphs=False, chunked_prefill=True)
    args = artifact.llm_args(config, "pytorch", "fp8")
    assert args["kv_cache_config"]["enable_block_reuse"] is False
    assert args["kv_cache_config"]["dtype"] == "fp8"
    assert args["cuda_graph_config"] is None
    assert args["enable_chunked_prefill"] is True
    assert "cuda_graph_config" not in artifact.llm_args(EngineConfig(), "pytorch", "none")


def serve_words(script: Path) -> list[str]:
    """The words of trtllm-serve's command in a launch script."""
    text = script.read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if "trtllm-serve" in line and not line.startswith("#"))
    words = shlex.split(line.replace("exec ", "", 1).split("trtllm-llmapi-launch")[-1].strip().rstrip("'"))
    return [word for word in words[words.index("trtllm-serve") + 1 :] if word != "$@"]


def test_serve_flags_are_in_the_contract(tmp_path):
    unverified = {"--custom_tokenizer", "--revision", "--config", "--grpc"}
    known = set(CONTRACT["trtllm-serve"]) - unverified
    checkpoint = write_checkpoint(tmp_path / "trtllm")
    tensorrt.prepare(checkpoint, tmp_path / "engine", EngineConfig(backend="tensorrt"))
    for script in ("serve.sh", "slurm.sh"):
        model, *words = serve_words(tmp_path / "engine" / "launch" / script)
        assert model.endswith(("$engine", "$ENGINE"))
        check_flags(words, known)
        assert words[words.index("--backend") + 1] in CONTRACT["trtllm-serve_notes"]["--backend"]


def test_serve_flags_of_a_pytorch_engine_are_in_the_contract():
    known = set(CONTRACT["trtllm-serve"])
    for sparse in (True, False):
        model, *words = pytorch._serve(EngineConfig(tensor_parallel=2), sparse)[1:]
        assert model == "$engine"
        check_flags(words, known)
        assert ("--custom_module_dirs" in words) == sparse


def test_the_stand_ins_quant_config_is_the_contracts():
    source = (Path(__file__).parents[1] / "stand_in/tensorrt_llm/models/modeling_utils.py").read_text()
    (section,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == "QuantConfig"]
    fields = {node.target.id for node in section.body if isinstance(node, ast.AnnAssign)}
    assert fields == {name for name, field in CONTRACT["QuantConfig"].items() if "since" not in field}


def test_completed_checkpoint_config_has_only_keys_that_the_model_config_reads():
    hf = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0}}
    for architecture in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        added = set(complete_config(hf, {"architecture": architecture})) - {"architecture"}
        assert added <= LLAMA_KEYS | (QWEN_KEYS if architecture.startswith("Qwen") else set())


def test_quantization_keys_that_we_let_through_are_quant_configs():
    known = {name for name, field in CONTRACT["QuantConfig"].items() if "since" not in field}
    assert known == trtllm_checkpoint.QUANTIZATION_KEYS
    assert {name for name in trtllm_checkpoint.FORMATS if name} <= set(CONTRACT["QuantAlgo"])
    assert {name for name in trtllm_checkpoint.KV_CACHES if name} <= set(CONTRACT["KV_CACHE_QUANT_ALGO_LIST"])


def test_required_keys_are_those_without_a_default():
    needed = {name for name, field in CONTRACT["PretrainedConfig"].items() if field["default"] == "<required>"}
    assert needed <= set(trtllm_checkpoint.REQUIRED)


def test_llm_args_file_is_plain_yaml(tmp_path):
    artifact.write_llm_args(tmp_path, EngineConfig(), "pytorch", "fp8")
    assert yaml.safe_load((tmp_path / "llm_args.yaml").read_text()) == artifact.llm_args(
        EngineConfig(), "pytorch", "fp8"
    )
