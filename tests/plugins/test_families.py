"""Each supported family's smallest model: ModelOpt's real export of it passes every release's config checks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from builder.config import EngineConfig
from builder.engines.trtllm import checkpoint as trtllm_checkpoint
from builder.engines.trtllm import pytorch
from builder.planning import compatibility
from calibration.quantization import export
from calibration.quantization.quantize import load_model
from plugins.common.families import FAMILIES
from plugins.sparsity.declaration import Declaration
from tests.support.contract import RELEASES, facts
from tests.support.models import random_model

NAMES = ("Llama", "Mistral", "Qwen2", "Qwen3")
FAMILY_KEYS = {"mlp_bias", "attn_bias", "rotary_base", "rotary_scaling"}  # read by LLaMAConfig and QWenConfig
QWEN_KEYS = {"qwen_type", "seq_length"}


@pytest.fixture(scope="module", params=NAMES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family's model as checkpoint/ and checkpoint-trtllm/, in bf16."""
    folder = tmp_path_factory.mktemp(request.param)
    source = random_model(folder / "source", request.param)
    export.export_trtllm(load_model(source), source, folder / "checkpoint-trtllm", Declaration(), 1, 1)
    names = set(load_file(source / "model.safetensors"))
    export.copy_checkpoint(source, folder / "checkpoint", Declaration(), names)
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf8"))


@pytest.mark.parametrize("release", ["1.0", "1.1", "1.2"])
def test_tensorrt_llm_reads_every_key_of_the_split_checkpoint(exported: Path, release: str) -> None:
    config = read(exported / "checkpoint-trtllm" / "config.json")
    known = facts("PretrainedConfig", release)
    assert "**kwargs" in known  # what ModelOpt writes beside these becomes an attribute, with a warning
    assert set(config) >= FAMILY_KEYS | (QWEN_KEYS if config["architecture"].startswith("Qwen") else set())
    assert {name for name, fact in known.items() if fact["default"] == "<required>"} <= set(config)
    assert set(config["quantization"] or {}) <= set(facts("QuantConfig", release))
    assert trtllm_checkpoint.read(exported / "checkpoint-trtllm").format == "bf16"
    assert compatibility.check_release("tensorrt", f"{release}.0").ok


@pytest.mark.parametrize("release", RELEASES)
def test_the_pytorch_backend_reads_the_unified_checkpoint(exported: Path, tmp_path: Path, release: str) -> None:
    pytorch.build(exported / "checkpoint", tmp_path / "engine", EngineConfig(backend="pytorch"))
    config = read(tmp_path / "engine" / "config.json")
    assert config["architectures"][0] in FAMILIES
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"  # transformers 4 and 5
    assert {"rope_theta", "rope_scaling", "rope_parameters"} <= set(config)
    assert read(tmp_path / "engine" / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert compatibility.check_release(
        "pytorch", f"{release.removesuffix('rc')}.0" if release != "main" else "1.3.0"
    ).ok
