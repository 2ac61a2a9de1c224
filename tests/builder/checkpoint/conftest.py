"""Checkpoints that ModelOpt really writes, made once for all the tests here."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import declare

from builder.checkpoint import normalize_zeros


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "exports" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)  # ModelOpt exports four models


@pytest.fixture(scope="session")
def exports(docs_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks of docs-llama, pruned, quantized and exported by ModelOpt: fp8/ and int8/ (unified HF), their -trt/ at
    tensor parallel 2, fp8-kv/ (unpruned), unfolded/ (fp8 without mts.export), fp8-raw/ (fp8 before -0.0 was mended)."""
    import modelopt.torch.quantization as mtq
    import modelopt.torch.sparsity as mts
    import torch
    from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("exports")
    ids = torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(0))
    configs = {"fp8": mtq.FP8_DEFAULT_CFG, "int8": mtq.INT8_SMOOTHQUANT_CFG, "unfolded": mtq.FP8_DEFAULT_CFG}
    configs["fp8-kv"] = mtq.utils.update_quant_cfg_with_kv_cache_quant(
        copy.deepcopy(mtq.FP8_DEFAULT_CFG), mtq.FP8_KV_CFG["quant_cfg"]
    )
    for name, config in configs.items():
        model = AutoModelForCausalLM.from_pretrained(docs_llama, dtype=torch.bfloat16, num_hidden_layers=2)
        layers = [name for name, _ in model.named_modules() if name.endswith("_proj")]
        if name != "fp8-kv":
            model = mts.sparsify(model, "sparse_magnitude")
        if name in ("fp8", "int8"):
            model = mts.export(model)
        with torch.inference_mode():
            model = mtq.quantize(model, copy.deepcopy(config), lambda module: module(ids))
            if name in ("fp8", "int8"):
                export_tensorrt_llm_checkpoint(
                    model, "llama", torch.bfloat16, root / f"{name}-trt", inference_tensor_parallel=2
                )
                declare(root / f"{name}-trt", trtllm_layers())
            export_hf_checkpoint(model, export_dir=root / name)
        if name != "fp8-kv":
            declare(root / name, layers)
    shutil.copytree(root / "fp8", root / "fp8-raw")
    for name in ("fp8", "fp8-trt"):
        normalize_zeros(root / name)
    return root


def trtllm_layers() -> list[str]:
    parts = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
    return [f"transformer.layers.{block}.{part}" for block in range(2) for part in parts]


@pytest.fixture
def copy_of(exports: Path, tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        directory = tmp_path / "checkpoint"
        shutil.copytree(exports / name, directory)
        return directory

    return make
