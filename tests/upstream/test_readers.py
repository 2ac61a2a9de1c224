"""Other tools that can be installed are run for real: transformers 4.53, 4.57 and 5, vLLM, TensorRT's bindings.

Each needs an environment of its own. TWOFOUR_READERS is the folder that contains them; docs/tensorrt_llm.md
describes how to make them. Missing ones are skipped.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.config import EngineConfig
from builder.engines.torch_backend import artifact
from calibration.quantization.export import copy_checkpoint
from plugins.common.request import Request
from plugins.sparsity.declaration import Declaration
from tests.support.command import done
from tests.support.models import cut_llama, random_model, write_recipe

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
READERS = ("transformers-4.53", "transformers-4.57", "transformers-5")
NEW_TOKENS = 16
CONFIG = EngineConfig(backend="torch", max_batch_size=1, max_seq_len=128)
pytestmark = pytest.mark.slow


def python_of(reader: str) -> Path:
    """The interpreter of a reader's environment; skips the test where there is none."""
    python = Path(os.environ.get("TWOFOUR_READERS", "/nowhere")) / reader / "bin" / "python"
    if not python.is_file():
        pytest.skip(f"no environment of {reader}: make it as docs/tensorrt_llm.md describes, and set TWOFOUR_READERS")
    return python


def run(reader: str, *fragment: object) -> Any:
    """The JSON that a script of this folder prints in a reader's environment, after whatever else is printed there."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [python_of(reader), Path(__file__).with_name(f"read_with_{reader.split('-')[0]}.py"), *fragment]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(next(line for line in reversed(ran.stdout.splitlines()) if line.startswith("{")))


def prune(weight: torch.Tensor) -> torch.Tensor:
    """The two largest of each group of 4 inputs."""
    groups = weight.float().abs().unflatten(-1, (-1, 4))
    kept = torch.zeros_like(groups).scatter_(-1, groups.topk(2).indices, 1).flatten(-2)
    return torch.where(kept.bool(), weight, torch.zeros_like(weight))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A build's own checkpoint/ in bf16 and in FP8, and a 2:4 one of each family's smallest random model."""
    folder = tmp_path_factory.mktemp("readers")
    recipe = write_recipe(folder / "recipe.yaml", cut_llama(folder / "llama"))
    builds = {
        "2of4-all": ("--preset", "2of4-all"),
        "fp8-2of4-all": ("--preset", "fp8-2of4-all"),
        "hybrid": ("--preset", "2of4-all", "--set", "sparsity.fraction=50%"),  # channels in another order
    }
    for name, options in builds.items():
        done("build", recipe, *options, "--set", "sparsity.method=magnitude", "--until", "checkpoint",
             "--out", folder / name, "--store", folder / "store")  # fmt: skip
        (folder / name / "checkpoint").rename(folder / f"built-{name}")
    for family in FAMILIES:
        source = random_model(folder / f"{family}-dense", family)
        tensors = load_file(source / "model.safetensors")
        layers = [name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight")]
        tensors |= {f"{layer}.weight": prune(tensors[f"{layer}.weight"]) for layer in layers}
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        copy_checkpoint(source, folder / family, Declaration(tuple(layers), method="magnitude"), set(tensors))
    return {name: folder / name for name in (*FAMILIES, *(f"built-{name}" for name in builds))}


def own_tokens(checkpoint: Path, ids: list[int], out: Path) -> list[int]:
    """What our torch engine answers, greedily, in float32."""
    artifact.build(checkpoint, out, CONFIG)
    engine = artifact.load(out, dtype=torch.float32)
    request = Request("0", tuple(ids), NEW_TOKENS, ignore_eos=True)
    return [token.token for token in engine.generate([request])]


@pytest.mark.parametrize("reader", READERS)
def test_transformers_generates_what_our_engine_does(checkpoints: dict[str, Path], tmp_path: Path, reader: str) -> None:
    answer = run(reader, NEW_TOKENS, *checkpoints.values())
    assert answer["version"].startswith(reader.split("-")[1])
    for name, checkpoint in checkpoints.items():
        result = answer["checkpoints"][name]
        written = json.loads((checkpoint / "config.json").read_text())
        assert result["dtype"] == "torch.bfloat16", name
        assert result["rope_theta"] == written["rope_theta"], name
        assert "Python standard library" in result["text"], name
        if name != "built-fp8-2of4-all":
            assert result["tokens"] == own_tokens(checkpoint, result["ids"], tmp_path / name), name


def test_vllm_generates_what_our_engine_does(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    ids = [5, 17, 300, 4001, 9]
    answer = run("vllm", NEW_TOKENS, checkpoints["built-2of4-all"], *ids)
    assert answer["tokens"] == own_tokens(checkpoints["built-2of4-all"], ids, tmp_path / "engine")


def test_tensorrts_own_bindings_take_our_plugins_fields() -> None:
    answer = run("tensorrt")
    assert answer["fields"] == {"weight_type": "INT32", "scale": "FLOAT32", "weight": "UNKNOWN"}
    assert answer["unknown_creator"] is None  # how network.py detects that the library is not loaded
    assert all(answer["phases"] + answer["types"])
    assert answer["add_plugin_v3"] in (True, None)  # None: the lean bindings define no networks
    assert answer["inspector_format"]
