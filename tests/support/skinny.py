"""Weights, activations and calls of libtwofour's skinny kernels as the host simulates them."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from plugins.libtwofour import bindings, structures
from tests.support import native

DTYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}
OUT = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}

SCALE = 2e-3  # of a product that has none for each channel


def random_values(shape: tuple[int, ...], format: str, rng: np.random.Generator) -> np.ndarray:
    if format == "int8":
        return rng.integers(-128, 128, shape).astype(np.int8)
    return (rng.standard_normal(shape) * 2).astype(DTYPES[format])


def poison(w_NK: np.ndarray, format: str, rng: np.random.Generator) -> np.ndarray:
    """Turns some zeros into -0.0 and some kept values into the smallest denormal."""
    if format == "int8":
        return w_NK
    bits = w_NK.view(f"u{w_NK.itemsize}").copy()
    chance = rng.random(bits.shape)
    sign = 1 << (8 * w_NK.itemsize - 1)
    zero = bits & (sign - 1) == 0
    bits[zero & (chance < 0.3)] = sign
    bits[~zero & (chance < 0.1)] = 1
    return bits.view(w_NK.dtype)


def pack(host: bindings.Context, w_NK: np.ndarray, format: str, kernel: str = "skinny") -> np.ndarray:
    problem = structures.gemm(kernel, format, "fp16", *w_NK.shape)
    packed = native.aligned(np.zeros(host.weight_bytes(problem), np.uint8))
    weight = native.aligned(w_NK)
    host.prepare_weight(problem, weight.ctypes.data, packed.ctypes.data)
    return packed


def matmul(
    host: bindings.Context,
    x_MK: np.ndarray,
    packed: np.ndarray,
    format: str,
    out: str,
    out_features: int,
    scale: float = 1.0,
    channel_scales: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    algorithm: tuple[int, ...] | None = None,
    kernel: str = "skinny",
) -> np.ndarray:
    x = native.aligned(x_MK)
    y = native.aligned(np.full((x_MK.shape[0], out_features), np.nan, OUT[out]))
    addresses = [0 if a is None else a.ctypes.data for a in (channel_scales, bias)]
    problem = structures.gemm(kernel, format, out, out_features, x_MK.shape[1], x_MK.shape[0], scale, *addresses)
    if algorithm is not None:
        host.set_algorithm(problem, algorithm + (0,) * (8 - len(algorithm)))
    workspace = native.aligned(np.full(host.workspace_bytes(problem), 0xCD, np.uint8))
    host.matmul(problem, x.ctypes.data, packed.ctypes.data, y.ctypes.data, (workspace.ctypes.data, workspace.nbytes))
    return y


def check_product(
    y_MN: np.ndarray,
    x_MK: np.ndarray,
    w_NK: np.ndarray,
    formats: tuple[str, str],
    scales: np.ndarray | None,
    bias: np.ndarray | None,
) -> None:
    """y against float64, int8 bit for bit. `formats`: of the operands and of y."""
    format, out = formats
    factor = np.float32(SCALE) if scales is None else scales
    shift = np.float32(0) if bias is None else bias.astype(np.float32)
    if format == "int8":  # exact: int32 sums, then one rounding each for scale, bias and output
        sums = x_MK.astype(np.int64) @ w_NK.astype(np.int64).T
        expected = (sums.astype(np.float32) * factor + shift).astype(OUT[out])
        np.testing.assert_array_equal(y_MN.view(np.uint16), expected.view(np.uint16))
        return
    x, w = x_MK.astype(np.float64), w_NK.astype(np.float64)
    expected = x @ w.T * factor + shift
    size = np.abs(x) @ np.abs(w).T * factor + np.abs(shift)
    epsilon = 2.0 ** (-10 if out == "fp16" else -7)
    assert (np.abs(y_MN.astype(np.float64) - expected) <= epsilon * np.abs(expected) + 2.0**-20 * size + 1e-7).all()


shapes = {
    "format": st.sampled_from(sorted(DTYPES)),
    "n": st.integers(1, 150),
    "chunks": st.integers(1, 40),  # of 16 bytes: K on and off the 256-input blocks
    "seed": st.integers(0, 2**32 - 1),
}


def in_features(format: str, chunks: int) -> int:
    return chunks * 16 // np.dtype(DTYPES[format]).itemsize
