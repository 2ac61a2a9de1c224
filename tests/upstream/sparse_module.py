"""An engine of a small model, loaded by the real model class and the real loader's steps, its products compared.

The attention and everything that runs on a GPU are left out: what is compared is each linear layer's own product.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from builder.config import EngineConfig
from builder.engines.trtllm import pytorch
from tests.support.stand_ins import ROOT

MODEL = ROOT / "examples" / "docs-llama"


class OnCpu(TorchFunctionMode):
    """Sends to the CPU what is meant for a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "cuda":
            return args[0]
        return func(*map(self.move, args), **{name: self.move(value) for name, value in (kwargs or {}).items()})

    @staticmethod
    def move(value: Any) -> Any:
        on_gpu = isinstance(value, (str, torch.device)) and str(value).startswith("cuda")
        return torch.device("cpu") if on_gpu else value


def check(fp8: bool, require: Callable[[bool, str], None]) -> str:
    """Raises what `require` raises where a layer is not compressed, keeps its weight, or multiplies wrongly."""
    with tempfile.TemporaryDirectory() as folder, OnCpu(), torch.inference_mode():
        engine = write_engine(Path(folder), fp8)
        model = load(engine)
        weights = load_file(engine / "model.safetensors")
        return compare(model, weights, require)


def write_engine(folder: Path, fp8: bool) -> Path:
    from tests.support.pytorch_checkpoints import write_checkpoint

    checkpoint = write_checkpoint(folder / "checkpoint", fp8, sparse=True)
    pytorch.build(checkpoint, folder / "engine", EngineConfig(backend="pytorch", max_batch_size=4, max_seq_len=128))
    return folder / "engine"


def load(engine: Path) -> Any:
    """The engine's own model class, from the real registry; loaded, then walked over as the loader does."""
    from tensorrt_llm._torch.model_config import ModelConfig
    from tensorrt_llm._torch.models.modeling_utils import MODEL_CLASS_MAPPING

    sys.modules.pop("twofour_sparse", None)
    sys.path.insert(0, str(engine))
    import twofour_sparse

    assert Path(str(twofour_sparse.__file__)).parent.parent == engine
    sys.path.remove(str(engine))
    config = ModelConfig.from_pretrained(str(engine), trust_remote_code=False)
    config._frozen = False
    config.skip_create_weights_in_init = True
    model = MODEL_CLASS_MAPPING["LlamaForCausalLM"](config)
    model.load_weights(load_file(engine / "model.safetensors"))
    try:
        from tensorrt_llm._torch.pyexecutor.model_loader import ModelLoader

        walk = ModelLoader._walk_full_post_load
    except (ImportError, AttributeError):  # before June 2026 the loop is a part of load()
        walk = walk_as_before
    walk(model)
    return model


def walk_as_before(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "post_load_weights") and not getattr(module, "_weights_removed", False):
            module.post_load_weights()


def compare(model: Any, weights: dict[str, torch.Tensor], require: Callable[[bool, str], None]) -> str:
    from plugins.common.fused_layers import fused_parts

    # by name: a model's own aliases (next_attn) hide some from named_modules
    layers = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    names = [f"model.layers.{block}.{layer}" for block in range(len(model.model.layers)) for layer in layers]
    for name in names:
        module = model.get_submodule(name)
        require(hasattr(module, "twofour"), f"'{name}' was not compressed")
        require(module.weight.numel() == 0, f"'{name}' keeps its dense weight")
        x_MK = torch.randn(3, module.in_features).to(module.dtype)
        scaled = [
            weights[f"{part}.weight"].float() * weights.get(f"{part}.weight_scale", 1.0) for part in fused_parts(name)
        ]
        expected = x_MK.float() @ torch.cat(scaled).T
        output = module.quant_method.apply(module, x_MK, None).float()
        error = (output - expected).norm() / expected.norm()
        require(bool(error < 0.05), f"'{name}' is off by {error:.3f}")
    return f"{len(names)} layers are compressed, their dense weights gone, their products right"
