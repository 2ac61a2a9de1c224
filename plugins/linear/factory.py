"""Makes the linear layers that the torch engine runs, from the tensors stored under a layer's name:

    weight [N, K] | a packed weight (plugins/sparsity/torch_packing.py)
    weight_scale  [] or [N], input_scale [], pre_quant_scale [K]    8-bit layers only; int8 without input_scale: each
                                                                    token has its own
    bias          [N]

The weight's dtype gives the format. Without `choices` a layer runs on torch's own products (torch_linear.py), with
them on our kernels (kernel_linear.py on CUDA, cpu_linear.py on a CPU).

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from plugins.common.defaults import SPARSE_KERNELS
from plugins.common.errors import UserError
from plugins.common.formats import Format
from plugins.common.patterns import PATTERNS, cpu_kernel
from plugins.linear.torch_linear import (
    DenseLinear,
    Fp8Linear,
    Fp8ValuesLinear,
    Int8Linear,
    Int8TokenLinear,
    Linear,
    QuantizedLinear,
    Scales,
)
from plugins.sparsity.torch_packing import VALUES, Packed, unpack

FORMATS = {getattr(torch, format.dtype): format.value for format in Format} | {torch.float64: "fp64"}
CPU_KERNELS = (*map(cpu_kernel, PATTERNS), "cpu-dense")
EIGHT_BIT = (torch.int8, torch.float8_e4m3fn)
UNFIT = ("misaligned", "unsupported")  # statuses of libtwofour after which torch's own product takes the layer


def build_linear(
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    device: torch.device,
    choices: Sequence[tuple[int, str]] | None = None,
) -> Linear:
    """The layer that `tensors` describe, computing in `dtype` on `device`.

    `choices` names a kernel by tokens (kernel_linear.py, cpu_linear.py); None asks for torch's own products, which also
    take over where a kernel cannot take the layer's shape. Raises UserError where a tensor is missing, or the weight's
    dtype is not one of ours.
    """
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    packed = Packed.of(tensors) if VALUES in tensors else None
    stored, pattern = (tensors["weight"], None) if packed is None else (packed.values, packed.pattern)
    if stored.dtype not in FORMATS:
        raise UserError(f"a weight has dtype {stored.dtype}, not one of {', '.join(FORMATS.values())}: export it again")
    scales = _scales(tensors, stored.dtype) if stored.dtype in EIGHT_BIT else None
    if choices is not None and device.type == "cpu" and choices[0][1] in CPU_KERNELS:
        from plugins.linear import cpu_linear

        on_cpu = cpu_linear.build(tensors, scales, dtype, choices)
        on_cpu.format, on_cpu.pattern = FORMATS[stored.dtype], pattern
        return on_cpu
    w_NK = stored if packed is None else unpack(*packed)
    bias_N = tensors.get("bias")
    layer, refused = None, None
    if choices is not None:
        layer, refused = _on_kernels(w_NK, scales, bias_N, dtype, choices)
    if layer is None:
        layer = _on_torch(w_NK, scales, bias_N, dtype)
    layer.format, layer.pattern, layer.refused = FORMATS[stored.dtype], pattern, refused
    layer.out_features, layer.in_features = w_NK.shape
    return layer


def _scales(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> Scales:
    needed = ("weight_scale",) if dtype == torch.int8 else ("weight_scale", "input_scale")
    for name in needed:
        if name not in tensors:
            raise UserError(f"an 8-bit layer has no {name}: export it with static scales")
    pre_quant, of_input = tensors.get("pre_quant_scale"), tensors.get("input_scale")
    return Scales(
        tensors["weight_scale"].float().reshape(-1),
        None if of_input is None else of_input.float().reshape(1),
        None if pre_quant is None else pre_quant.float(),
    )


def _on_torch(w_NK: torch.Tensor, scales: Scales | None, bias_N: torch.Tensor | None, dtype: torch.dtype) -> Linear:
    if scales is None:
        return DenseLinear(w_NK, bias_N, dtype)
    if scales.input is None:
        return Int8TokenLinear(w_NK, scales, bias_N, dtype)
    kind: type[QuantizedLinear] = Int8Linear
    if w_NK.dtype == torch.float8_e4m3fn:
        kind = Fp8Linear if w_NK.is_cuda else Fp8ValuesLinear
    return kind(w_NK, scales, bias_N, dtype)


def _on_kernels(
    w_NK: torch.Tensor,
    scales: Scales | None,
    bias_N: torch.Tensor | None,
    dtype: torch.dtype,
    choices: Sequence[tuple[int, str]],
) -> tuple[Linear | None, str | None]:
    """(the layer, None), or (None, why a kernel cannot take it)."""
    from plugins.libtwofour.bindings import LibraryError
    from plugins.linear.kernel_linear import KernelLinear

    if scales is not None and scales.input is None:
        return None, "no kernel on a GPU takes inputs with a scale for each token"
    try:
        return KernelLinear(w_NK, scales, bias_N, dtype, choices), None
    except LibraryError as error:
        if error.status not in UNFIT:
            raise
        return None, str(error)


def share_input(layers: Sequence[Linear]) -> None:
    """Lets layers that are always called with one and the same tensor, and scale it alike, round it once."""
    first = layers[0].quantizer
    if first is None:
        return
    for layer in layers[1:]:
        own = layer.quantizer
        if own is not None and own.rounds_like(first):
            layer.quantizer = first
            first.users += 1


def remarks(layers: Iterable[Linear]) -> list[str]:
    """What a reader of measurements should know of how these layers run, a sentence each."""
    layers = list(layers)
    sentences = []
    kernels = {layer: re.split(" or | and ", layer.kernel) for layer in layers if layer.sparse}
    unpacked = [layer for layer, names in kernels.items() if SPARSE_KERNELS.isdisjoint(names)]
    if any(next(layer.buffers()).device.type == "cpu" for layer in unpacked):
        patterns = " and ".join(sorted({str(layer.pattern) for layer in unpacked}))
        sentences.append(f"{patterns} weights are unpacked when they are loaded, and gain nothing")
    if any(isinstance(layer, Fp8ValuesLinear) for layer in layers):
        sentences.append("fp8 numbers are multiplied as floats: torch's own float8 product is far slower on a CPU")
    for reason in sorted({layer.refused for layer in layers if layer.refused}):
        sentences.append(f"some layers run on torch's own product: {reason}")
    return sentences
