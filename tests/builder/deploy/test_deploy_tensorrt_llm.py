"""What is deployed for TensorRT-LLM's backends, run on stand-ins of ours for the templates of NVIDIA's container."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder.config import DeployConfig
from builder.deploy.repository import write_repository
from plugins.common.errors import UserError

CONTAINER = Path(__file__).parents[2] / "data" / "deploy"  # stand-ins for NVIDIA's templates, ours, with the same holes


@pytest.fixture
def engine_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "build" / "engine"
    directory.mkdir(parents=True)
    return directory


@pytest.fixture
def trtllm(engine_dir: Path) -> Callable[..., Path]:
    """Deploys an engine of one of TensorRT-LLM's backends and runs what was written, as in NVIDIA's container."""

    def deploy(backend: str, reuse: bool = True, **options: Any) -> Path:
        facts = {"backend": backend, "max_batch_size": 8, "chunked_prefill": True, "kv_cache_block_reuse": reuse}
        (engine_dir / "engine.json").write_text(json.dumps(facts))
        settings = {"max_batch_size": 8, "kv_cache_config": {"enable_block_reuse": reuse}}
        (engine_dir / "llm_args.yaml").write_text(yaml.safe_dump(settings))
        write_repository(engine_dir, engine_dir.parent / "triton", DeployConfig(**options))
        moved = engine_dir.parent.with_name("moved")
        engine_dir.parent.rename(moved)
        program = [sys.executable, str(moved / "triton" / "make_repository.py")]
        subprocess.run(program, env={"TEMPLATES": str(CONTAINER)}, check=True, capture_output=True, timeout=30)
        return moved / "triton" / "repository"

    return deploy


def test_the_inflight_batchers_holes_are_filled(trtllm: Callable[..., Path]) -> None:
    repository = trtllm("tensorrt", streaming=False)
    config = (repository / "tensorrt_llm" / "config.pbtxt").read_text()
    assert "max_batch_size: 8\n" in config
    assert "decoupled: False" in config
    assert f'string_value: "{repository.parents[1] / "engine"}"' in config
    assert '"${lora_cache_max_adapter_size}"' in config, "to the backend an open parameter is one that is not set"
    assert f'"{repository.parents[1] / "engine"}"' in (repository / "preprocessing" / "config.pbtxt").read_text()


def test_the_engines_path_counts_from_the_model_as_in_other_repositories(trtllm: Callable[..., Path]) -> None:
    repository = trtllm("tensorrt", engine_path="../../engine")
    assert f'"{repository.parents[1] / "engine"}"' in (repository / "tensorrt_llm" / "config.pbtxt").read_text()


def test_the_llm_api_model_loads_the_engine_with_its_settings(trtllm: Callable[..., Path]) -> None:
    repository = trtllm("pytorch")
    model = repository / "tensorrt_llm" / "1"
    assert yaml.safe_load((model / "model.yaml").read_text()) == {
        "model": str(repository.parents[1] / "engine"),
        "backend": "pytorch",
        "max_batch_size": 8,
        "kv_cache_config": {"enable_block_reuse": True},
        "triton_config": {"max_batch_size": 0, "decoupled": True},
    }
    assert (model / "model.py").read_text() == (CONTAINER / "llmapi" / "tensorrt_llm" / "1" / "model.py").read_text()


@pytest.mark.parametrize("reuse", [True, False])
def test_block_reuse_is_the_recipes_in_both_layouts(trtllm: Callable[..., Path], reuse: bool) -> None:
    """An open hole is not the same: the C++ backend takes it for true."""
    config = (trtllm("tensorrt", reuse) / "tensorrt_llm" / "config.pbtxt").read_text()
    assert f'"enable_kv_cache_reuse" value: {{ string_value: "{reuse}" }}' in config


@pytest.mark.parametrize("reuse", [True, False])
def test_block_reuse_reaches_the_llm_api_model(trtllm: Callable[..., Path], reuse: bool) -> None:
    settings = yaml.safe_load((trtllm("pytorch", reuse) / "tensorrt_llm" / "1" / "model.yaml").read_text())
    assert settings["kv_cache_config"]["enable_block_reuse"] is reuse


def test_sparse_layers_are_registered_before_the_engine_starts(
    trtllm: Callable[..., Path], engine_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (engine_dir / "twofour_sparse").mkdir()
    package = engine_dir / "twofour_sparse" / "__init__.py"
    package.write_text("import container_model\ncontainer_model.order.append('sparse')\n")
    model = trtllm("pytorch") / "tensorrt_llm" / "1"
    code = "import model; model.TritonPythonModel().initialize({}); print(model.container_model.order)"
    environment = {"PYTHONPATH": str(model.parents[3] / "engine")}
    ran = subprocess.run([sys.executable, "-c", code], cwd=model, env=environment, capture_output=True, text=True)
    assert ran.stdout.strip() == "['sparse', 'engine']", ran.stderr


def test_an_open_hole_that_triton_cannot_read_is_named(engine_dir: Path, tmp_path: Path) -> None:
    (engine_dir / "engine.json").write_text(json.dumps({"backend": "tensorrt", "max_batch_size": 8}))
    write_repository(engine_dir, engine_dir.parent / "triton", DeployConfig())
    templates = tmp_path / "inflight_batcher_llm" / "ensemble"
    templates.mkdir(parents=True)
    (templates / "config.pbtxt").write_text("max_batch_size: ${triton_max_batch_size}\nnewer: ${newer_than_us}\n")
    program = [sys.executable, str(engine_dir.parent / "triton" / "make_repository.py")]
    ran = subprocess.run(program, env={"TEMPLATES": str(tmp_path)}, capture_output=True, text=True, timeout=30)
    assert ran.returncode == 1
    assert "needs values for newer_than_us" in ran.stderr


def test_tensorrt_llm_has_no_response_cache_here(engine_dir: Path) -> None:
    (engine_dir / "engine.json").write_text(json.dumps({"backend": "tensorrt", "max_batch_size": 8}))
    with pytest.raises(UserError, match="response_cache is for torch engines"):
        write_repository(engine_dir, engine_dir.parent / "triton", DeployConfig(response_cache=True))
