"""Every field, flag and key that we hand to TensorRT-LLM is one that it has, by tests/data/tensorrt_llm.json.

The package itself cannot be installed here. The file was read from its public sources, release by release: what has
`since` or `until` is not in every release, and is emitted only for those that have it.
"""

import ast
import itertools
import re
import shlex
from pathlib import Path

import pytest
import yaml

from builder.config import DeployConfig, EngineConfig
from builder.deploy.trtllm_repository import holes
from builder.engines.trtllm import artifact, launch, pytorch, tensorrt
from builder.engines.trtllm import checkpoint as trtllm_checkpoint
from calibration.quantization.trtllm_config import complete_config
from plugins.common.formats import INT8_PER_TOKEN
from tests.support.contract import RELEASES, SECTIONS, check_flags, facts, source, switches
from tests.support.stand_in_checkpoint import CONFIG, LAYERS, write_checkpoint

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
        for fields, known in ((settings, facts("BuildConfig")), (plugin_config, facts("PluginConfig"))):
            for name, value in fields.items():
                assert name in known
                assert matches(value, known[name]["type"]), (name, value, known[name]["type"])
                assert value in known[name].get("choices", [value])


def test_every_flag_of_the_build_command_is_in_the_contract(tmp_path):
    for checkpoint, config, routes in everything_buildable(tmp_path):
        out = tmp_path / "engine"
        ratios = {layer: 2.0 for layer, route in routes.items() if route == "plugin"}
        command = tensorrt.prepare(checkpoint, out, config, ratios=ratios)
        assert command[0] == "trtllm-build"
        check_flags(command, facts("trtllm-build"), switches("trtllm-build"))
        gemm = command[command.index("--gemm_plugin") + 1]
        assert gemm in facts("trtllm-build")["--gemm_plugin"]["choices"]
        features = [f"--{name}" for name, field in facts("PluginConfig").items() if field["type"] == "bool"]
        assert all(command[command.index(f) + 1] in ("enable", "disable") for f in features if f in command)


def test_gemm_plugin_is_off_wherever_native_sparse_tactics_are_wanted(tmp_path):
    for checkpoint, config, routes in everything_buildable(tmp_path):
        settings = tensorrt.build_config(trtllm_checkpoint.read(checkpoint), config, routes)
        assert settings["weight_sparsity"] == ("native" in routes.values())
        if "native" in routes.values():
            hiding = ("gemm_plugin", "low_latency_gemm_plugin", "gemm_swiglu_plugin", "manage_weights")
            defaults = {name: facts("PluginConfig")[name]["default"] for name in hiding}
            assert not any((defaults | settings["plugin_config"])[name] for name in hiding)


@pytest.mark.parametrize("backend", ["tensorrt", "pytorch"])
def test_llm_args_keys_are_in_the_contract(backend):
    known = facts("BaseLlmArgs") | facts("TorchLlmArgs" if backend == "pytorch" else "TrtLlmArgs")
    for graphs, cache, chunked in itertools.product((True, False), ("none", "fp8"), (True, False)):
        config = EngineConfig(cuda_graphs=graphs, chunked_prefill=chunked, tensor_parallel=2)
        args = artifact.llm_args(config, backend, cache)
        assert set(args) <= set(known)
        for name, value in args["kv_cache_config"].items():
            assert matches(value, facts("KvCacheConfig")[name]["type"])
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
    share = artifact.llm_args(EngineConfig(kv_cache_memory="30%"), "pytorch", "none")["kv_cache_config"]
    amount = artifact.llm_args(EngineConfig(kv_cache_memory="2GiB"), "pytorch", "none")["kv_cache_config"]
    assert (share["free_gpu_memory_fraction"], amount["max_gpu_total_bytes"]) == (0.3, 2**31)
    assert set(share | amount) <= set(facts("KvCacheConfig"))


@pytest.mark.parametrize("backend", ["tensorrt", "pytorch"])
def test_a_budget_of_the_cache_becomes_tensorrt_llms_own_eviction(backend):
    args = artifact.llm_args(EngineConfig(kv_cache_budget=1024), backend, "none")
    cache = args["kv_cache_config"]
    assert set(args) <= set(facts("BaseLlmArgs") | facts("TorchLlmArgs" if backend == "pytorch" else "TrtLlmArgs"))
    assert cache["enable_block_reuse"] is False
    if backend == "pytorch":
        assert args["sparse_attention_config"] == {"algorithm": "rocket", "prompt_budget": 1024}
        assert "max_attention_window" not in cache
    else:
        assert (cache["max_attention_window"], cache["sink_token_length"]) == ([1024], 4)
        assert set(cache) <= set(facts("KvCacheConfig"))


def serve_arguments(script: Path) -> list[str]:
    """The arguments of the command that a launch script ends with."""
    text = script.read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if "$engine" in line.lower() and "--backend" in line)
    arguments = shlex.split(line.replace("exec ", "", 1).split("trtllm-llmapi-launch")[-1].strip().rstrip("'"))
    program = 3 if arguments[0] == "python3" else 1
    return [word for word in arguments[program:] if word != "$@"]


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("backend", ["tensorrt", "pytorch"])
def test_serve_flags_are_in_the_contract(tmp_path, backend, sparse, release):
    if backend == "tensorrt" and release not in ("1.0", "1.1", "1.2"):
        pytest.skip("the release builds no TensorRT engine that twofour supports")
    config = EngineConfig(backend=backend, tensor_parallel=2)
    command = tensorrt._serve(config) if backend == "tensorrt" else pytorch._serve(config, sparse)
    launch.write(tmp_path, config, command, "image", backend, modules=sparse, preload=False)
    for script in ("serve.sh", "slurm.sh"):
        model, *arguments = serve_arguments(tmp_path / "launch" / script)
        assert model in ("$engine", "$ENGINE")
        known = facts("trtllm-serve", release)
        at = arguments.index("--backend")
        assert f"--backend {arguments[at + 1]}" in known
        check_flags(arguments[:at] + arguments[at + 2 :], known)


def test_nothing_that_slurms_launcher_would_split_is_quoted(tmp_path):
    """Until 2026 trtllm-llmapi-launch ran its arguments without quotes: `python3 -c '...'` would break there."""
    launch.write(tmp_path, EngineConfig(), pytorch._serve(EngineConfig(), True), "image", "pytorch", True, False)
    assert (
        "trtllm-llmapi-launch python3 -m twofour_sparse $ENGINE --backend" in (tmp_path / "launch/slurm.sh").read_text()
    )


def test_every_fact_has_a_source():
    for section, whole in SECTIONS.items():
        for name, fact in whole["facts"].items():
            where = source(section, name)
            assert re.fullmatch(r"[\w.-]+/[\w.-]+", where["repo"]), (section, name)
            assert re.fullmatch(r"[0-9a-f]{40}", where["commit"]), (section, name)
            assert where["path"], (section, name)
            assert {fact.get("since", RELEASES[0]), fact.get("until", RELEASES[0])} <= set(RELEASES), (section, name)


def test_every_hole_of_the_inflight_batcher_that_is_filled_is_one():
    values = holes({"max_batch_size": 8}, True, DeployConfig())
    assert set(values) <= set(facts("inflight_batcher_llm"))


def test_the_stand_ins_quant_config_is_the_contracts():
    source = (Path(__file__).parents[1] / "stand_in/tensorrt_llm/models/modeling_utils.py").read_text()
    (section,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == "QuantConfig"]
    fields = {node.target.id for node in section.body if isinstance(node, ast.AnnAssign)}
    assert fields == set(facts("QuantConfig"))


def test_completed_checkpoint_config_has_only_keys_that_the_model_config_reads():
    hf = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0}}
    for architecture in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        added = set(complete_config(hf, {"architecture": architecture})) - {"architecture"}
        assert added <= LLAMA_KEYS | (QWEN_KEYS if architecture.startswith("Qwen") else set())


def test_quantization_keys_that_we_let_through_are_quant_configs():
    known = set(facts("QuantConfig"))
    assert known == trtllm_checkpoint.QUANTIZATION_KEYS
    assert {name for name in trtllm_checkpoint.OF_ALGORITHM if name} <= set(facts("QuantAlgo"))
    assert INT8_PER_TOKEN in facts("QuantAlgo")
    assert {name for name in trtllm_checkpoint.OF_KV_ALGORITHM if name} <= set(facts("KV_CACHE_QUANT_ALGO_LIST"))


def test_required_keys_are_those_without_a_default():
    needed = {name for name, field in facts("PretrainedConfig").items() if field["default"] == "<required>"}
    assert needed <= set(trtllm_checkpoint.REQUIRED)


def test_llm_args_file_is_plain_yaml(tmp_path):
    artifact.write_llm_args(tmp_path, EngineConfig(), "pytorch", "fp8")
    assert yaml.safe_load((tmp_path / "llm_args.yaml").read_text()) == artifact.llm_args(
        EngineConfig(), "pytorch", "fp8"
    )
