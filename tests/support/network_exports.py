"""TensorRT-LLM checkpoints of docs-llama for two ranks, and the stand-in package."""

import pytest
import torch

from builder.config import EngineConfig
from builder.engines.trtllm import sparsity_report, tensorrt, version_lock
from plugins.common.nvidia_smi import Gpu
from tests.support.pytorch_checkpoints import LINEARS, MODEL, ROOT, prune, token_ids
from tests.support.stand_ins import STAND_IN

FORMATS = ("none", "fp8", "int8")


RANKS = 2


CONFIG = EngineConfig(backend="tensorrt", max_batch_size=4, max_seq_len=128, tensor_parallel=RANKS)


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """{format: directory with hf/ and trtllm/}, written by calibration's own code."""
    from calibration.config import Quantization
    from calibration.quantization import export
    from calibration.quantization.quantize import load_model, quantize
    from plugins.sparsity.declaration import Declaration

    layers = [f"model.layers.{i}.{'self_attn' if n in LINEARS[:4] else 'mlp'}.{n}" for i in range(6) for n in LINEARS]
    declared = Declaration(tuple(layers), method="magnitude")
    root, actual = tmp_path_factory.mktemp("exports"), {}
    for number_format in FORMATS:
        model = load_model(MODEL)
        with torch.no_grad():
            for name in layers:
                weight = model.get_submodule(name).weight
                weight.copy_(prune(weight))
        out = root / number_format
        if number_format != "none":
            model = quantize(model, Quantization(format=number_format), layers, token_ids().numpy())
        export.export_trtllm(model, MODEL, out / "trtllm", declared, RANKS, 1)
        if number_format == "none":
            model.save_pretrained(out / "hf")
            export.copy_tokenizer(MODEL, out / "hf")
            declared.write(out / "hf")
        else:
            export.export_hf(model, MODEL, out / "hf", declared)
        actual[number_format] = out
    return actual


@pytest.fixture
def with_stand_in(monkeypatch):
    """This process as if it stood in TensorRT-LLM's container, on two GPUs; the ranks import the stand-in."""
    monkeypatch.setenv("PYTHONPATH", f"{STAND_IN}:{ROOT}")
    monkeypatch.setattr(version_lock, "installed", {"tensorrt_llm": "1.2.1", "tensorrt": "10.14.1"}.get)
    cards = (Gpu("NVIDIA H100", 90, 80 << 30, 79 << 30, "580.1"),) * 2
    for module in (tensorrt, sparsity_report, version_lock):
        monkeypatch.setattr(module, "gpus", lambda: cards)
