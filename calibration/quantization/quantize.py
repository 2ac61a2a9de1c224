"""ModelOpt post-training quantization: INT8 SmoothQuant W8A8, FP8, and the KV cache.

SmoothQuant: Xiao et al., 2023 (arXiv 2211.10438), with static scales or a scale for each token. FP8 e4m3 with one
static scale a tensor: Micikevicius et al., 2022 (arXiv 2209.05433). The model comes back with ModelOpt's quantizers in
it: fake-quantized, ready for export.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calibration.config import Quantization
from calibration.data.windows import Tokens
from calibration.model.loading import load_causal_lm
from calibration.model.silence import suppress_output
from calibration.quantization.fused import share_weight_scales
from calibration.quantization.smoothing import smooth
from plugins.common.errors import UserError
from plugins.common.progress import Progress

log = logging.getLogger(__name__)

BATCH = 8  # windows a forward pass


def load_model(directory: Path) -> nn.Module:
    """The model in its own 16-bit or 32-bit dtype, on the GPU where there is one. Raises UserError."""
    return load_causal_lm(directory, device_map="auto" if torch.cuda.is_available() else None)


def quantize(
    model: nn.Module, config: Quantization, layers: Sequence[str], tokens: Tokens, progress: Progress | None = None
) -> nn.Module:
    """Calibrates and inserts quantizers, in place.

    `layers` are the modules to quantize, by full name; every other linear layer stays as it is. A quantized `lm_head`
    gets its own weight where it shares the embedding's. `tokens` [samples, length]. Raises UserError where a
    layer's range comes out empty or not finite, which calibration text can cause.
    """
    import modelopt.torch.quantization as mtq

    def calibrate(module: nn.Module) -> None:
        device = next(module.parameters()).device
        batches = torch.from_numpy(tokens).split(BATCH)
        for number, batch in enumerate(batches, start=1):
            module(batch.to(device), use_cache=False)
            if progress:
                progress("quantize", number, len(batches))

    for layer in layers:
        if shares_embedding(model, layer):
            untie(model, layer)
    with suppress_output(), torch.inference_mode():
        model = mtq.quantize(model, modelopt_config(config, layers), calibrate)
    if config.activations == "per_token":
        _check_ranges(model, layers)
        smooth(model, layers)
    share_weight_scales(model)
    _note_zeros(give_zeros_a_range(model))
    if config.activations == "per_tensor":
        _check_ranges(model, layers)
    return model


def shares_embedding(model: Any, layer: str) -> bool:
    """Whether the weight of `layer` is the embedding's own (`tie_word_embeddings`)."""
    return model.get_submodule(layer).weight is model.get_input_embeddings().weight


def untie(model: Any, layer: str) -> None:
    """Gives `layer` a copy of the embedding: smoothing and rounding would otherwise change the embedding too."""
    module = model.get_submodule(layer)
    module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def modelopt_config(config: Quantization, layers: Sequence[str]) -> dict[str, Any]:
    """ModelOpt's configuration: its own for the format, with exactly `layers` switched on."""
    import modelopt.torch.quantization as mtq

    base = {"int8": mtq.INT8_SMOOTHQUANT_CFG, "fp8": mtq.FP8_DEFAULT_CFG}.get(config.format)
    off: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    entries: list[dict[str, Any]] = off
    algorithm: Any = "max"
    if base is not None:
        algorithm = base["algorithm"]
        channels = -1 if config.activations == "per_token" else None
        if channels:
            algorithm = "max"  # `smooth` does the rest
        bits: Any = 8 if config.format == "int8" else (4, 3)
        axis = 0 if config.format == "int8" else None
        for layer in layers:
            entries.append({"quantizer_name": f"{layer}.weight_quantizer", "cfg": {"num_bits": bits, "axis": axis}})
            entries.append({"quantizer_name": f"{layer}.input_quantizer", "cfg": {"num_bits": bits, "axis": channels}})
    if config.kv_cache != "none":
        kv_bits: Any = 8 if config.kv_cache == "int8" else (4, 3)
        entries.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": {"num_bits": kv_bits, "axis": None}})
    return {"quant_cfg": entries, "algorithm": algorithm}


def give_zeros_a_range(model: nn.Module) -> list[str]:
    """Gives quantizers that saw only zeros the range of their format, so that their scale is 1; returns their names.

    Blocks added by block expansion (LLaMA Pro, arXiv 2401.02415) have output projections of zeros. A scale of 0 would
    divide 0 by 0. Call it after `share_weight_scales`: a layer of zeros takes the range of those that it is fused with.
    """
    zeros = []
    for name, module in model.named_modules():
        amax = getattr(module, "amax", None)
        if amax is not None and amax.numel() and bool((amax == 0).any()):
            module.amax = torch.where(amax == 0, torch.full_like(amax, _largest(module)), amax)
            if bool((amax == 0).all()):
                zeros.append(name)
    return zeros


def _largest(quantizer: Any) -> float:
    """The largest number of the quantizer's format."""
    return 448.0 if quantizer.num_bits == (4, 3) else float(2 ** (quantizer.num_bits - 1) - 1)


def _note_zeros(quantizers: Sequence[str]) -> None:
    if quantizers:
        layer = quantizers[0].rpartition(".")[0]
        more = f" (and {len(quantizers) - 1} more)" if len(quantizers) > 1 else ""
        log.warning(f"'{layer}'{more} has only zeros in its weight or its inputs: quantized with scale 1")


def _check_ranges(model: nn.Module, layers: Sequence[str]) -> None:
    """Every weight and input range must be finite; an input never seen has none."""
    modules = dict(model.named_modules())
    for layer in layers:
        for which in ("weight", "input"):
            amax = getattr(getattr(modules[layer], f"{which}_quantizer", None), "amax", None)
            if amax is None or not bool(torch.isfinite(amax).all()) or bool((amax < 0).any()):
                raise UserError(
                    f"'{layer}': the {which} range is {'missing' if amax is None else 'not finite'} after calibration: "
                    "check the calibration text and the model's weights"
                )
