"""The kernels as torch operators `torch.ops.twofour.*`: with fake implementations, safe in CUDA graphs.

    quantize(x_MK, multiplier, dtype)                                                     -> q_MK
    skinny_linear(x_MK, packed, scale, channel_scales, bias, out_features, out_dtype)     -> y_MN, 1 to 64 tokens
    skinny_4of8_linear, skinny_5of8_linear, skinny_6of8_linear(... the same ...)          -> y_MN, likewise
    cusparselt_linear(x_MK, compressed, ... the same ...)                                 -> y_MN
    dense_linear(x_MK, w_NK, ... the same ...)                                            -> y_MN, by cuBLASLt
    linear_into(y_MN!, x_MK, weight, kernel, scale, channel_scales, bias, accumulate)     y_MN = or += the product

y = s * (x_MK w_NK^T) + bias, where s is `channel_scales` [N] float32, or the number `scale` where that is None; the
bias [N] has the out_dtype. x has the weight's dtype: float16, bfloat16, int8 or float8_e4m3fn. Numerics are those of
plugins/common/numerics.py: int8 exact in int32, then each of scale, bias and output rounded once.

On CUDA these run libtwofour; on a CPU the reference, which `cusparselt_linear` lacks, as its compressed form is
cuSPARSELt's own. `prepare` turns a dense weight that holds the operator's pattern into what it takes.

Legend: M tokens, N out_features, K in_features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from plugins.common import numerics
from plugins.common.errors import UserError
from plugins.common.patterns import OF_EIGHT, PATTERNS, TENSOR_CORE, skinny_kernel
from plugins.libtwofour import bindings, cpu_forms, structures
from plugins.libtwofour.cpu_forms import pack_skinny, reference_linear, skinny_product

FORMATS = cpu_forms.FORMATS
DTYPES = {name: dtype for dtype, name in FORMATS.items()}


@torch.library.custom_op("twofour::quantize", mutates_args=(), device_types="cpu")
def quantize(x: torch.Tensor, multiplier: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [M, K] times `multiplier` ([1] or [K] float32: 1 / input scale), rounded to int8 or float8_e4m3fn, clamped."""
    rounded = numerics.quantize_int8 if dtype == torch.int8 else numerics.quantize_fp8
    return rounded(x.float(), multiplier)


def _skinny(pattern: str) -> Any:
    """The skinny kernel's operator; the packed weight as skinny_layout.py and, of n:8, skinny_layout_of8.py lay it out.

    It raises UserError above 64 tokens.
    """
    name = skinny_kernel(pattern).replace("-", "_")

    @torch.library.custom_op(f"twofour::{name}_linear", mutates_args=(), device_types="cpu")
    def multiply(
        x_MK: torch.Tensor,
        packed_weight: torch.Tensor,
        scale: float,
        channel_scales: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_features: int,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        return skinny_product(pattern, x_MK, packed_weight, scale, channel_scales, bias, out_features, out_dtype)

    return multiply


skinny_linear = _skinny(TENSOR_CORE)


@torch.library.custom_op("twofour::cusparselt_linear", mutates_args=(), device_types="cpu")
def cusparselt_linear(
    x_MK: torch.Tensor,
    compressed: torch.Tensor,
    scale: float,
    channel_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """cuSPARSELt; `compressed` belongs to the GPU and library version that `prepare` ran on."""
    raise UserError("a weight compressed by cuSPARSELt is readable on its GPU only: use skinny_linear or dense_linear")


@torch.library.custom_op("twofour::dense_linear", mutates_args=(), device_types="cpu")
def dense_linear(
    x_MK: torch.Tensor,
    w_NK: torch.Tensor,
    scale: float,
    channel_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """cuBLASLt, with the algorithm that a search kept."""
    return reference_linear(x_MK, w_NK, scale, channel_scales, bias, out_dtype)


OPERATORS: dict[str, Callable[..., torch.Tensor]] = {
    "skinny": skinny_linear,
    "cusparselt": cusparselt_linear,
    "cublaslt": dense_linear,
    **{skinny_kernel(pattern): _skinny(pattern) for pattern in OF_EIGHT},
}


@torch.library.custom_op("twofour::linear_into", mutates_args=("y_MN",), device_types="cpu")
def linear_into(
    y_MN: torch.Tensor,
    x_MK: torch.Tensor,
    weight: torch.Tensor,
    kernel: str,
    scale: float,
    channel_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    accumulate: bool,
) -> None:
    """Writes the product of a kernel to y, or adds it in float32 ("cublaslt" alone). x and y may be slices."""
    if accumulate and kernel != "cublaslt":
        raise UserError(f"{kernel} cannot add to the values in y: use cublaslt")
    product_MN = OPERATORS[kernel](x_MK, weight, scale, channel_scales, bias, y_MN.shape[1], torch.float32)
    y_MN.copy_(y_MN + product_MN if accumulate else product_MN)


@quantize.register_fake
def _(x: torch.Tensor, multiplier: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@quantize.register_kernel("cuda")
def _(x: torch.Tensor, multiplier: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    x = x.contiguous()
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    if x.numel():
        bindings.context(x.device.index).quantize(
            FORMATS[dtype],
            FORMATS[x.dtype],
            (x.numel() // x.shape[-1], x.shape[-1]),
            x.data_ptr(),
            (multiplier.data_ptr(), multiplier.numel()),
            q.data_ptr(),
            _stream(x),
        )
    return q


def launch(
    kernel: str,
    x_MK: torch.Tensor,
    weight: torch.Tensor,
    scale: float,
    channel_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """What the operators do on CUDA: one call of libtwofour on torch's current stream."""
    y_MN = torch.empty((x_MK.shape[0], out_features), dtype=out_dtype, device=x_MK.device)
    launch_into(y_MN, x_MK.contiguous(), weight, kernel, scale, channel_scales, bias, False)
    return y_MN


def launch_into(
    y_MN: torch.Tensor,
    x_MK: torch.Tensor,
    weight: torch.Tensor,
    kernel: str,
    scale: float,
    channel_scales: torch.Tensor | None,
    bias: torch.Tensor | None,
    accumulate: bool,
) -> None:
    """`linear_into` on CUDA."""
    if x_MK.shape[0] == 0:
        return
    problem = describe(kernel, x_MK, y_MN.shape[1], y_MN.dtype, scale, channel_scales, bias)
    problem.accumulate = accumulate
    run(problem, x_MK, weight, y_MN)


def run(problem: structures.Gemm, x_MK: torch.Tensor, weight: torch.Tensor, y_MN: torch.Tensor) -> None:
    """One call of libtwofour on torch's current stream. x and y may be slices."""
    problem.x_pitch, problem.y_pitch = _pitch(x_MK), _pitch(y_MN)
    context = bindings.context(x_MK.device.index)
    # From torch's allocator: inside a CUDA graph it comes from the graph's own pool.
    needed = context.workspace_bytes(problem)
    try:
        workspace = torch.empty(needed, dtype=torch.uint8, device=x_MK.device)
    except torch.OutOfMemoryError:
        kernel = structures.KERNELS[problem.kernel]
        raise UserError(
            f"no GPU memory for the {needed >> 20} MiB of workspace that {kernel} needs at {x_MK.shape[0]} tokens: "
            "lower engine.max_num_tokens, or free memory"
        ) from None
    place = (workspace.data_ptr(), workspace.nbytes)
    context.matmul(problem, x_MK.data_ptr(), weight.data_ptr(), y_MN.data_ptr(), place, _stream(x_MK))


def _pitch(x_MK: torch.Tensor) -> int:
    """Elements between rows where they are slices of wider ones; 0: dense."""
    if x_MK.is_contiguous():  # one row, whatever its stride
        return 0
    if x_MK.stride(1) != 1:
        raise UserError(f"a matrix with strides {x_MK.stride()}: its rows must be contiguous")
    return int(x_MK.stride(0))


def _register(op: Any, kernel: str) -> None:
    @op.register_fake  # type: ignore[untyped-decorator]
    def _(
        x_MK: torch.Tensor,
        weight: torch.Tensor,
        scale: float,
        channel_scales: torch.Tensor | None,
        bias: torch.Tensor | None,
        out_features: int,
        out_dtype: torch.dtype,
    ) -> torch.Tensor:
        return x_MK.new_empty((x_MK.shape[0], out_features), dtype=out_dtype)

    op.register_kernel("cuda")(partial(launch, kernel))


@linear_into.register_fake
def _(*_: Any) -> None:
    return None


linear_into.register_kernel("cuda")(launch_into)
for _kernel, _op in OPERATORS.items():
    _register(_op, _kernel)


def describe(
    kernel: str,
    x_MK: torch.Tensor,
    out_features: int,
    out_dtype: torch.dtype,
    scale: float = 1.0,
    channel_scales: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> structures.Gemm:
    """The problem of one call as libtwofour describes it. The tensors must outlive it."""
    if x_MK.dtype not in FORMATS or out_dtype not in (torch.float16, torch.bfloat16):
        raise UserError(f"no kernel takes {x_MK.dtype} to {out_dtype}: {', '.join(FORMATS.values())} to fp16 or bf16")
    for name, tensor, dtype in (("channel_scales", channel_scales, torch.float32), ("bias", bias, out_dtype)):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != (out_features,)):
            raise UserError(f"{name} is {tensor.dtype} {list(tensor.shape)}: it must be {dtype} [{out_features}]")
    return structures.gemm(
        kernel,
        FORMATS[x_MK.dtype],
        FORMATS[out_dtype],
        out_features,
        x_MK.shape[1],
        x_MK.shape[0],
        scale,
        0 if channel_scales is None else channel_scales.data_ptr(),
        0 if bias is None else bias.data_ptr(),
    )


def prepare(w_NK: torch.Tensor, kernel: str) -> torch.Tensor:
    """A dense weight [N, K] that holds the kernel's pattern, as `kernel` takes it: uint8, itself for "cublaslt".

    Raises UserError naming the first row and group that breaks the pattern, or sizes that fit the kernel.
    """
    w_NK = w_NK.detach().contiguous()
    if kernel == "cublaslt":
        return w_NK
    if w_NK.is_cuda:
        return prepare_on_device(w_NK, kernel)
    if kernel == "cusparselt":
        raise UserError("cuSPARSELt compresses for the GPU it runs on: move the weight to CUDA")
    pattern = next(pattern for pattern in PATTERNS if skinny_kernel(pattern) == kernel)
    return pack_skinny(w_NK, pattern)


def prepare_on_device(w_NK: torch.Tensor, kernel: str, sparse: tuple[int, int] = (0, 0)) -> torch.Tensor:
    """`prepare` by libtwofour; `sparse`: rows and inputs of a hybrid kernel's weight."""
    out = "fp16" if w_NK.dtype == torch.float16 else "bf16"
    rows, columns = w_NK.shape
    problem = structures.gemm(kernel, FORMATS[w_NK.dtype], out, rows, columns, sparse=sparse)
    context = bindings.context(w_NK.device.index)
    prepared = torch.empty(context.weight_bytes(problem), dtype=torch.uint8, device=w_NK.device)
    context.prepare_weight(problem, w_NK.data_ptr(), prepared.data_ptr(), _stream(w_NK))
    return prepared


def _stream(tensor: torch.Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)
