"""ModelOpt post-training quantization: INT8 SmoothQuant W8A8, FP8, and the KV cache.

SmoothQuant: Xiao et al., 2023 (arXiv 2211.10438). FP8 e4m3 with one static scale a tensor: Micikevicius et al., 2022
(arXiv 2209.05433). The model comes back with ModelOpt's quantizers in it: fake-quantized, ready for export.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from calibration.config import Quantization
from calibration.data.windows import Tokens
from calibration.model.silence import suppress_output
from calibration.quantization.fused import share_weight_scales
from plugins.common.errors import UserError
from plugins.common.progress import Progress

BATCH = 8  # windows a forward pass


def load_model(directory: Path) -> nn.Module:
    """The model in its own 16-bit or 32-bit dtype, on the GPU where there is one. Raises UserError."""
    from transformers import AutoModelForCausalLM

    try:
        with suppress_output():
            model: nn.Module = AutoModelForCausalLM.from_pretrained(
                str(directory),
                dtype="auto",
                use_safetensors=True,
                device_map="auto" if torch.cuda.is_available() else None,
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"'{directory}' cannot be loaded ({reason}): check its files") from None
    return model.eval()


def quantize(
    model: nn.Module, config: Quantization, layers: Sequence[str], tokens: Tokens, progress: Progress | None = None
) -> nn.Module:
    """Calibrates and inserts quantizers, in place.

    `layers` are the modules to quantize, by full name; every other linear layer stays as it is. `tokens` [samples,
    length]. Raises UserError where a layer's range comes out empty or not finite, which calibration text can cause.
    """
    import modelopt.torch.quantization as mtq

    def calibrate(module: nn.Module) -> None:
        device = next(module.parameters()).device
        batches = torch.from_numpy(tokens).split(BATCH)
        for number, batch in enumerate(batches, start=1):
            module(batch.to(device), use_cache=False)
            if progress:
                progress("quantize", number, len(batches))

    with suppress_output(), torch.inference_mode():
        model = mtq.quantize(model, modelopt_config(config, layers), calibrate)
    share_weight_scales(model)
    _check_ranges(model, layers)
    return model


def modelopt_config(config: Quantization, layers: Sequence[str]) -> dict[str, Any]:
    """ModelOpt's configuration: its own for the format, with exactly `layers` switched on."""
    import modelopt.torch.quantization as mtq

    base = {"int8": mtq.INT8_SMOOTHQUANT_CFG, "fp8": mtq.FP8_DEFAULT_CFG}.get(config.format)
    off: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    entries, algorithm = off, "max"
    if base is not None:
        algorithm = base["algorithm"]
        bits: Any = 8 if config.format == "int8" else (4, 3)
        axis = 0 if config.format == "int8" else None
        for layer in layers:
            entries.append({"quantizer_name": f"{layer}.weight_quantizer", "cfg": {"num_bits": bits, "axis": axis}})
            entries.append({"quantizer_name": f"{layer}.input_quantizer", "cfg": {"num_bits": bits, "axis": None}})
    if config.kv_cache != "none":
        kv_bits: Any = 8 if config.kv_cache == "int8" else (4, 3)
        entries.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": kv_bits, "axis": None}})
    return {"quant_cfg": entries, "algorithm": algorithm}


def _check_ranges(model: nn.Module, layers: Sequence[str]) -> None:
    """Every weight and input range found must be finite; an input never seen has none."""
    modules = dict(model.named_modules())
    for layer in layers:
        for which in ("weight", "input"):
            amax = getattr(getattr(modules[layer], f"{which}_quantizer", None), "amax", None)
            if amax is None or not bool(torch.isfinite(amax).all()) or bool((amax < 0).any()):
                raise UserError(
                    f"'{layer}': the {which} range is {'missing' if amax is None else 'not finite'} after calibration: "
                    "check the calibration text and the model's weights"
                )
