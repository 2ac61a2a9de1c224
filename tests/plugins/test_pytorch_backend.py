"""The pytorch backend: what is written, and our module's whole logic on the stand-in (see tests/stand_in/README.md).

The stand-in is imported under TensorRT-LLM's name in a process of its own, so that no other test ever sees it.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from builder.config import EngineConfig
from builder.engines.torch_backend import artifact
from builder.engines.trtllm import pytorch, sparse_package
from plugins.common.errors import UserError
from tests.support import stand_ins
from tests.support.stand_ins import environment, job

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "docs-llama"
WIDE = {False: "float32", True: "float64"}  # of FP8's sums: float32's noise can carry an input to the next e4m3 number
CONFIG = EngineConfig(backend="pytorch", max_batch_size=4, max_seq_len=128)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def prune(weight: torch.Tensor) -> torch.Tensor:
    """The two largest of each group of 4 inputs."""
    groups = weight.float().abs().unflatten(-1, (-1, 4))
    mask = torch.zeros_like(groups).scatter_(-1, groups.topk(2).indices, 1).flatten(-2)
    return torch.where(mask.bool(), weight, torch.zeros_like(weight))


def quantize(tensors: dict[str, torch.Tensor], block: str) -> None:
    """FP8 in place, as ModelOpt writes it; the layers that TensorRT-LLM fuses share their weight scale."""
    for group in FUSED:
        names = [f"{block}.{'self_attn' if part in LINEARS[:4] else 'mlp'}.{part}" for part in group]
        largest = max(float(tensors[f"{name}.weight"].float().abs().max()) for name in names)
        # powers of two: multiplying by 1 / scale, as we do, is then dividing by it, as TensorRT-LLM does
        scale = torch.tensor(2.0 ** math.ceil(math.log2(largest / 448)))
        for name in names:
            weight = tensors[f"{name}.weight"].float() / scale
            tensors[f"{name}.weight"] = (weight + 0.0).to(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale"] = scale.clone()
            tensors[f"{name}.input_scale"] = torch.tensor(2.0**-6)


def write_checkpoint(out: Path, fp8: bool, sparse: bool) -> Path:
    """A unified checkpoint of docs-llama in a test's own hand: dense or 2:4, bf16 or FP8."""
    out.mkdir(parents=True)
    tensors = load_file(MODEL / "model.safetensors")
    layers = sorted(name.removesuffix(".weight") for name in tensors if name.split(".")[-2] in LINEARS)
    if sparse:
        for name in layers:
            tensors[f"{name}.weight"] = prune(tensors[f"{name}.weight"])
        declared = {"pattern": "2:4", "method": "magnitude", "layers": layers}
        (out / "sparsity.json").write_text(json.dumps(declared))
    config = json.loads((MODEL / "config.json").read_text())
    if fp8:
        for block in range(config["num_hidden_layers"]):
            quantize(tensors, f"model.layers.{block}")
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
        section = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
        (out / "hf_quant_config.json").write_text(
            json.dumps({"producer": {"name": "modelopt"}, "quantization": section})
        )
    (out / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((MODEL / name).read_bytes())
    save_file(tensors, out / "model.safetensors")
    return out


def token_ids() -> torch.Tensor:
    return torch.randint(4096, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    kinds = ((fp8, sparse) for fp8 in (False, True) for sparse in (False, True))
    return {(fp8, sparse): write_checkpoint(root / f"{fp8}-{sparse}", fp8, sparse) for fp8, sparse in kinds}


@pytest.fixture(scope="module")
def torch_logits(checkpoints, tmp_path_factory):
    """The torch engine's logits of each checkpoint, float32."""
    found = {}
    for kind, checkpoint in checkpoints.items():
        engine = tmp_path_factory.mktemp("torch-engine")
        artifact.build(checkpoint, engine, CONFIG)
        found[kind] = artifact.load(engine, dtype=getattr(torch, WIDE[kind[0]])).logits(token_ids())
    return found


# -- the module on the stand-in


@pytest.fixture(scope="module")
def told(checkpoints, tmp_path_factory):
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
def test_same_logits_as_the_torch_engine(told, torch_logits, fp8, sparse, ranks):
    found, expected = told[fp8, sparse, ranks], torch_logits[fp8, sparse]
    assert (found["logits"] - expected).abs().max() < (1e-5 if fp8 else 1e-4)
    methods = {name: method for name, method in found["methods"].items() if name != "lm_head"}
    base = "FP8{}LinearMethod" if fp8 else "{}LinearMethod"
    stock, ours = base.format("QDQ" if fp8 else "Unquantized"), "Sparse" + base.format("")
    assert set(methods.values()) == {ours if sparse else stock}
    assert found["methods"]["lm_head"] == "UnquantizedLinearMethod"


def test_torch_engine_says_other_things_of_pruned_weights(torch_logits):
    assert (torch_logits[False, True] - torch_logits[False, False]).abs().max() > 1  # or the test above shows nothing


def test_dense_weights_are_let_go_and_the_log_says_how_many(told):
    found = told[True, True, 1]
    kept = {name for (rank, name), count in found["dense_elements"].items() if count}
    assert kept == {"lm_head"}
    assert any("42 of 42 declared 2:4 layers have the sparse method" in line for line in found["log"])


def test_fused_layer_is_sparse_only_where_each_of_its_parts_is(checkpoints, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for path in checkpoints[False, True].iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    declared = json.loads((checkpoint / "sparsity.json").read_text())
    declared["layers"].remove("model.layers.0.self_attn.k_proj")
    (checkpoint / "sparsity.json").write_text(json.dumps(declared))
    pytorch.build(checkpoint, tmp_path / "engine", CONFIG)
    (told,) = stand_ins.load(tmp_path, token_ids(), job(tmp_path / "engine"))
    assert told["methods"]["model.layers.0.self_attn.qkv_proj"] == "UnquantizedLinearMethod"
    assert told["methods"]["model.layers.1.self_attn.qkv_proj"] == "SparseLinearMethod"
    assert any(
        "2 declared 2:4 layers stay dense, such as model.layers.0.self_attn.q_proj" in line for line in told["log"]
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
    words = [sys.executable, "-c", driver, str(engine), sparse_package.NAME]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=True)
    pickled, module = done.stdout.split()
    worker = """
import importlib, pickle, sys
from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING
pickle.loads(bytes.fromhex(sys.argv[1])) if sys.argv[1] != "-" else importlib.import_module(sys.argv[2])
print([base.__name__ for base in MODEL_CLASS_MAPPING["LlamaForCausalLM"].mro()][:3])
"""
    for given in (pickled, "-"):
        command = f"source '{engine}/launch/env.sh' && exec '{sys.executable}' -c \"$0\" \"$@\""
        words = ["bash", "-c", command, worker, given, module]
        done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=False)
        assert done.stdout.strip() == "['LlamaForCausalLM', 'SparseLinears', 'LlamaForCausalLM']", done.stderr


# -- what build writes


def test_engine_is_the_checkpoint_linked_with_a_module_and_launch_files(checkpoints, tmp_path):
    source, engine = checkpoints[True, True], tmp_path / "engine"
    pytorch.build(source, engine, CONFIG)
    assert (engine / "model.safetensors").samefile(source / "model.safetensors")
    facts = json.loads((engine / "engine.json").read_text())
    assert (facts["backend"], facts["format"]) == ("pytorch", "fp8")
    assert yaml.safe_load((engine / "llm_args.yaml").read_text())["max_batch_size"] == 4
    assert f'exec python3 -m {sparse_package.NAME} "$engine"' in (engine / "launch/serve.sh").read_text()
    assert not any(path.is_symlink() for path in engine.rglob("*"))


def test_dense_engine_needs_no_module(checkpoints, tmp_path):
    pytorch.build(checkpoints[False, False], tmp_path / "engine", CONFIG)
    assert not (tmp_path / "engine" / sparse_package.NAME).exists()
    assert 'exec trtllm-serve "$engine"' in (tmp_path / "engine/launch/serve.sh").read_text()


def test_transformers_4_finds_the_rotary_base_the_dtype_and_the_tokenizer_class(checkpoints, tmp_path):
    source = tmp_path / "checkpoint"
    source.mkdir()
    for path in checkpoints[False, False].iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
    (source / "config.json").write_text(json.dumps(config))
    pytorch.build(source, tmp_path / "engine", CONFIG)
    written = json.loads((tmp_path / "engine/config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]) == (500000.0, None)
    assert written["rope_parameters"] == config["rope_parameters"]
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    tokenizer = json.loads((tmp_path / "engine/tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_measured_kernels_reach_the_module(checkpoints, tmp_path):
    layer = "model.layers.0.mlp.down_proj"
    buckets = [{"tokens": 16, "kernel": "skinny"}, {"tokens": 256, "kernel": "dense-cublaslt"}]
    for source, expected in (("measured", [[16, "skinny"], [256, "dense-cublaslt"]]), ("predicted", None)):
        tactics = {"source": source, "layers": {layer: {"buckets": buckets}}}
        engine = tmp_path / source
        pytorch.build(checkpoints[False, True], engine, CONFIG, tactics=tactics)
        layers = json.loads((engine / sparse_package.NAME / "layers.json").read_text())["layers"]
        assert layers[layer] == expected
        assert layers["model.layers.1.mlp.down_proj"] is None
        assert json.loads((engine / "tactics.json").read_text()) == tactics


def test_int8_is_refused_with_what_to_use_instead(checkpoints, tmp_path):
    checkpoint = tmp_path / "int8"
    checkpoint.mkdir()
    for path in checkpoints[True, False].iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes().replace(b'"FP8"', b'"W8A8_SQ_PER_CHANNEL"'))
    with pytest.raises(UserError, match=r"no INT8 W8A8 linear layer.*use quantization.format=fp8"):
        pytorch.build(checkpoint, tmp_path / "engine", CONFIG)


def test_tensor_parallel_that_cuts_a_group_is_refused(checkpoints, tmp_path):
    config = CONFIG.model_copy(update={"tensor_parallel": 128})
    with pytest.raises(UserError, match="cuts a 2:4 group of 4"):
        pytorch.build(checkpoints[False, True], tmp_path / "engine", config)


def test_unknown_algorithm_of_a_newer_modelopt_is_refused(checkpoints, tmp_path):
    checkpoint = tmp_path / "newer"
    checkpoint.mkdir()
    for path in checkpoints[True, False].iterdir():
        (checkpoint / path.name).write_bytes(path.read_bytes())
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace('"FP8"', '"NVFP9"'))
    with pytest.raises(UserError, match="quant_algo is 'NVFP9': only NO_QUANT, W8A8_SQ_PER_CHANNEL, FP8"):
        pytorch.build(checkpoint, tmp_path / "engine", CONFIG)


def leave_in_16_bit(source: Path, out: Path, names: list[str]) -> Path:
    """The FP8 checkpoint, with layers of the first block excluded from quantization."""
    out.mkdir()
    for path in source.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(out / "model.safetensors")
    for name in names:
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].to(torch.bfloat16)
        del tensors[f"{name}.weight_scale"], tensors[f"{name}.input_scale"]
    save_file(tensors, out / "model.safetensors")
    for file, keys in (
        ("config.json", ("quantization_config", "ignore")),
        ("hf_quant_config.json", ("quantization", "exclude_modules")),
    ):
        content = json.loads((out / file).read_text())
        content[keys[0]][keys[1]] += names
        (out / file).write_text(json.dumps(content))
    return out


@pytest.mark.parametrize("release", ["1.0", "main"])
def test_excluded_projections_are_excluded_as_the_fused_layer_that_they_become(checkpoints, tmp_path, release):
    """1.0 looks for `qkv_proj` among the excluded names, later releases for its parts too."""
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    checkpoint = leave_in_16_bit(checkpoints[True, True], tmp_path / "checkpoint", names)
    pytorch.build(checkpoint, tmp_path / "engine", CONFIG)
    (result,) = stand_ins.load(tmp_path, token_ids(), job(tmp_path / "engine"), release=release)
    assert result["methods"]["model.layers.0.self_attn.qkv_proj"] == "SparseLinearMethod"
    assert result["methods"]["model.layers.1.self_attn.qkv_proj"] == "SparseFP8LinearMethod"


def test_some_parts_of_a_fused_layer_cannot_be_excluded(checkpoints, tmp_path):
    names = ["model.layers.0.self_attn.q_proj"]
    checkpoint = leave_in_16_bit(checkpoints[True, True], tmp_path / "checkpoint", names)
    with pytest.raises(
        UserError, match=r"q_proj bf16, k_proj fp8, v_proj fp8, and TensorRT-LLM fuses them into one qkv"
    ):
        pytorch.build(checkpoint, tmp_path / "engine", CONFIG)
