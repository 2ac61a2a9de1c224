"""libtwofour's host side (plans, padding, epilogues, algorithms, workspaces, errors) on a stand-in GPU with stand-in
libraries, which refuse what the real ones are known to refuse. The kernels' speed and the real libraries need a GPU."""

from __future__ import annotations

import ctypes

import ml_dtypes
import numpy as np
import pytest

from plugins.libtwofour import bindings, structures
from tests.support import c_api, native
from tests.support.stand_in_gpu import open_gpu, set_environment

DTYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}


CAPTURING = 0xC  # a stream


class Layer:
    """Operands of a layer, and y by numpy."""

    def __init__(self, format: str, n: int, k: int, tokens: int, out: str = "bf16", seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.format, self.n, self.k, self.tokens, self.out = format, n, k, tokens, out
        self.w = native.aligned(native.prune(self.numbers((n, k), rng), rng))
        self.x = native.aligned(self.numbers((tokens, k), rng))
        self.scales = native.aligned(rng.uniform(1e-3, 2e-3, n).astype(np.float32))
        self.bias = native.aligned(rng.standard_normal(n).astype(DTYPES[out]))

    def numbers(self, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        if self.format == "int8":
            return rng.integers(-128, 128, shape).astype(np.int8)
        return rng.standard_normal(shape).astype(DTYPES[self.format])

    def problem(self, kernel: str, scale: float = 1.0, scaled: bool = False, biased: bool = False) -> structures.Gemm:
        sizes = (self.n, self.k, self.tokens)
        addresses = (self.scales.ctypes.data if scaled else 0, self.bias.ctypes.data if biased else 0)
        halves = (self.n // 2, 0)  # what the hybrid kernels take for sparse; the whole weight is
        return structures.gemm(kernel, self.format, self.out, *sizes, scale, *addresses, sparse=halves)

    def prepare(self, gpu: bindings.Context, kernel: str) -> np.ndarray:
        problem = self.problem(kernel)
        prepared = native.aligned(np.zeros(gpu.weight_bytes(problem), np.uint8))
        gpu.prepare_weight(problem, self.w.ctypes.data, prepared.ctypes.data)
        return prepared

    def run(self, gpu: bindings.Context, kernel: str, problem: structures.Gemm, stream: int = 0) -> np.ndarray:
        prepared = self.prepare(gpu, kernel)
        y = native.aligned(np.full((self.tokens + 1, self.n), 99, DTYPES[self.out]))  # the last row must stay
        workspace = native.aligned(np.full(gpu.workspace_bytes(problem) + 16, 0xCD, np.uint8))
        place = (workspace.ctypes.data, workspace.nbytes - 16)
        gpu.matmul(problem, self.x.ctypes.data, prepared.ctypes.data, y.ctypes.data, place, stream)
        assert (workspace[-16:] == 0xCD).all()
        assert (y[-1].astype(np.float32) == 99).all()
        return y[:-1]

    def expected(self, scale: float, scaled: bool, biased: bool) -> np.ndarray:
        wide = np.int64 if self.format == "int8" else np.float64
        sums = (self.x.astype(wide) @ self.w.astype(wide).T).astype(np.float32)
        y = sums * (self.scales if scaled else np.float32(scale))
        return (y + self.bias.astype(np.float32)) if biased else y


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "channels"])
@pytest.mark.parametrize("kernel", structures.KERNELS)
@pytest.mark.parametrize(("format", "out"), [("bf16", "bf16"), ("fp16", "fp16"), ("int8", "fp16"), ("fp8", "bf16")])
def test_every_kernel_and_epilogue(
    gpu: bindings.Context, kernel: str, format: str, out: str, scaled: bool, biased: bool
) -> None:
    layer = Layer(format, 64, 96, 24, out)
    if (kernel, format in ("bf16", "fp16"), scaled) == ("cusparselt", True, True):
        with pytest.raises(bindings.LibraryError, match="takes no channel_scales with .* fold them into the weight"):
            gpu.plan(layer.problem(kernel, scaled=True))
        return
    scale = 2e-3 if format in ("int8", "fp8") else 1.0
    y = layer.run(gpu, kernel, layer.problem(kernel, scale, scaled, biased)).astype(np.float32)
    expected = layer.expected(scale, scaled, biased)
    np.testing.assert_allclose(y, expected, rtol=2.0 ** (-10 if out == "fp16" else -7), atol=2e-2)
    if format == "int8":
        np.testing.assert_array_equal(y, expected.astype(DTYPES[out]).astype(np.float32))


@pytest.mark.parametrize("tokens", [1, 5, 16, 24])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "channels"])
@pytest.mark.parametrize("format", sorted(DTYPES))
@pytest.mark.parametrize("kernel", structures.KERNELS)
def test_slices_of_x_and_y_and_sums_added_to_y(
    gpu: bindings.Context, kernel: str, format: str, scaled: bool, tokens: int
) -> None:
    """A layer between others in x and y: what is beside its columns stays. cuBLASLt adds to them too."""
    if scaled and format in ("bf16", "fp16"):
        return
    layer = Layer(format, 64, 96, tokens, format if format in ("bf16", "fp16") else "bf16", seed=1)
    scale = 2e-3 if format in ("int8", "fp8") else 1.0
    wide_x = native.aligned(np.tile(layer.x, 3))
    y, prepared = native.aligned(np.full((tokens, 128), 3, DTYPES[layer.out])), layer.prepare(gpu, kernel)
    for accumulate in (False, True) if kernel == "cublaslt" else (False,):
        problem = layer.problem(kernel, scale, scaled)
        problem.x_pitch, problem.y_pitch, problem.accumulate = 288, 128, accumulate
        workspace = native.aligned(np.full(gpu.workspace_bytes(problem), 0xCD, np.uint8))
        place = (workspace.ctypes.data, workspace.nbytes)
        before = y[:, 32:96].astype(np.float32) if accumulate else np.float32(0)
        gpu.matmul(problem, wide_x[:, 96:].ctypes.data, prepared.ctypes.data, y[:, 32:].ctypes.data, place)
        expected = layer.expected(scale, scaled, False) + before
        np.testing.assert_allclose(y[:, 32:96].astype(np.float32), expected, rtol=2**-7, atol=2e-2)
        assert (y[:, :32] == 3).all()
        assert (y[:, 96:] == 3).all()


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 15, 16, 17, 33])
@pytest.mark.parametrize("format", sorted(DTYPES))
def test_cusparselt_pads_tokens_in_the_workspace(gpu: bindings.Context, format: str, tokens: int) -> None:
    """x and y are padded where the library needs it, and its own workspace, which it scribbles over, is apart."""
    layer = Layer(format, 32, 64, tokens, format if format in ("fp16", "bf16") else "bf16", seed=tokens)
    for biased in (False, True):
        scale = 1e-2 if format in ("int8", "fp8") else 1.0
        y = layer.run(gpu, "cusparselt", layer.problem("cusparselt", scale, biased=biased)).astype(np.float32)
        np.testing.assert_allclose(y, layer.expected(scale, False, biased), rtol=2**-7, atol=2e-2)


def test_fp8_to_fp32_alone_still_gives_16_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = open_gpu(monkeypatch, STAND_IN_FP8="fp32")
    layer = Layer("fp8", 64, 64, 9)
    y = layer.run(gpu, "cusparselt", layer.problem("cusparselt", 0.5, biased=True)).astype(np.float32)
    np.testing.assert_allclose(y, layer.expected(0.5, False, True), rtol=2**-7, atol=2e-2)


def test_negative_zeros_never_reach_the_compression(gpu: bindings.Context) -> None:
    layer = Layer("fp16", 32, 64, 8, "fp16")
    before = layer.run(gpu, "cusparselt", layer.problem("cusparselt"))
    layer.w[layer.w == 0] = -0.0
    np.testing.assert_array_equal(before, layer.run(gpu, "cusparselt", layer.problem("cusparselt")))


def test_layers_of_one_shape_share_plans_but_not_scales(gpu: bindings.Context) -> None:
    for seed, scale in ((1, 0.5), (2, 0.25)):
        layer = Layer("fp8", 64, 64, 16, seed=seed)
        y = layer.run(gpu, "cusparselt", layer.problem("cusparselt", scale)).astype(np.float32)
        np.testing.assert_allclose(y, layer.expected(scale, False, False), rtol=2**-7, atol=2e-2)


def search(gpu: bindings.Context, layer: Layer, kernel: str, bytes_: int) -> structures.Search:
    prepared = layer.prepare(gpu, kernel)
    y = native.aligned(np.zeros((layer.tokens, layer.n), DTYPES[layer.out]))
    workspace = native.aligned(np.zeros(bytes_, np.uint8))
    place = (workspace.ctypes.data, workspace.nbytes)
    return gpu.search(layer.problem(kernel), layer.x.ctypes.data, prepared.ctypes.data, y.ctypes.data, place)


def test_search_takes_the_fastest_that_fits_and_counts_the_rest(gpu: bindings.Context) -> None:
    """The stand-in's later algorithms are faster, and need more workspace."""
    layer = Layer("bf16", 64, 64, 16)
    actual = search(gpu, layer, "cusparselt", 250_000)
    assert (actual.tried, actual.over_workspace) == (9, 0)  # 3 configurations x split-K of 1, and -1 in 2 modes
    assert gpu.algorithm(layer.problem("cusparselt"))[0] == 2
    actual = search(gpu, layer, "cusparselt", 150_000)
    assert (actual.tried, actual.over_workspace) == (6, 3)
    assert gpu.algorithm(layer.problem("cusparselt"))[0] == 1
    with pytest.raises(bindings.LibraryError, match="no algorithm of cusparselt ran; 9 need more workspace than 100"):
        search(gpu, layer, "cusparselt", 100)
    assert search(gpu, layer, "cublaslt", 250_000).tried == 3
    # K of one block cannot be split: the staged kernel, and the streamed one in two ways
    assert search(gpu, layer, "skinny", 1 << 20).tried == 3


def test_streamed_kernel_is_for_hopper_and_newer(monkeypatch: pytest.MonkeyPatch, gpu: bindings.Context) -> None:
    layer = Layer("bf16", 64, 64, 16)
    streamed = (1, 1) + (0,) * 6
    gpu.set_algorithm(layer.problem("skinny"), streamed)
    y = layer.run(gpu, "skinny", layer.problem("skinny")).astype(np.float32)
    np.testing.assert_allclose(y, layer.expected(1.0, False, False), rtol=2.0**-7, atol=2e-2)
    assert gpu.algorithm(layer.problem("skinny"))[:2] == streamed[:2]
    old = open_gpu(monkeypatch, sm=89)
    assert search(old, layer, "skinny", 1 << 20).tried == 1
    with pytest.raises(
        bindings.LibraryError, match="needs compute capability 9.0 or newer, this GPU has 8.9; use the sta"
    ):
        old.set_algorithm(layer.problem("skinny"), streamed)
    with pytest.raises(bindings.LibraryError, match="variant 2 of the skinny kernel is not staged"):
        gpu.set_algorithm(layer.problem("skinny"), (1, 2) + (0,) * 6)


def test_split_k_before_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = open_gpu(monkeypatch, sm=86)
    assert search(gpu, Layer("bf16", 64, 64, 16), "cusparselt", 1 << 20).tried == 12


def test_algorithm_serves_its_whole_bucket_of_tokens(gpu: bindings.Context) -> None:
    chosen, other = Layer("bf16", 64, 64, 33), Layer("bf16", 64, 64, 65)
    gpu.set_algorithm(chosen.problem("cusparselt"), (2, 1) + (0,) * 6)
    same = Layer("bf16", 64, 64, 64)
    assert gpu.algorithm(same.problem("cusparselt"))[0] == 2
    assert gpu.algorithm(other.problem("cusparselt"))[0] == 0
    one, eight = Layer("bf16", 64, 64, 1), Layer("bf16", 64, 64, 8)
    gpu.set_algorithm(one.problem("cublaslt"), gpu.algorithm(eight.problem("cublaslt")))
    fast = search(gpu, eight, "cublaslt", 250_000)
    assert fast.tried == 3
    assert gpu.algorithm(one.problem("cublaslt")) != gpu.algorithm(eight.problem("cublaslt")), "decode keeps its own"
    np.testing.assert_allclose(
        same.run(gpu, "cusparselt", same.problem("cusparselt")).astype(np.float32),
        same.expected(1.0, False, False),
        rtol=2**-7,
        atol=2e-2,
    )
    with pytest.raises(bindings.LibraryError, match="cusparseLtMatmulAlgSetAttribute"):
        gpu.set_algorithm(chosen.problem("cusparselt"), (77, 1) + (0,) * 6)


def test_capture_needs_a_plan_and_then_neither_allocates_nor_waits(gpu: bindings.Context) -> None:
    for kernel in structures.KERNELS:
        layer = Layer("bf16", 64, 64, 16)
        problem = layer.problem(kernel)
        prepared = layer.prepare(gpu, kernel)
        y, workspace = (native.aligned(np.zeros(1 << 20, np.uint8)) for _ in range(2))
        call = (problem, layer.x.ctypes.data, prepared.ctypes.data, y.ctypes.data)
        place = (workspace.ctypes.data, workspace.nbytes)
        if kernel in ("cusparselt", "cublaslt"):
            with pytest.raises(bindings.LibraryError, match="no plan for 16 tokens .* call twofour_plan first"):
                gpu.matmul(*call, place, CAPTURING)
        gpu.plan(problem)
        gpu.matmul(*call, place, CAPTURING)


def test_token_counts_padded_to_the_same_share_a_plan(gpu: bindings.Context) -> None:
    for format, planned, shared, other in (("bf16", 17, 24, 25), ("int8", 17, 32, 33)):
        layer = Layer(format, 64, 64, shared)
        prepared = layer.prepare(gpu, "cusparselt")
        gpu.plan(structures.gemm("cusparselt", format, "bf16", 64, 64, planned, 0.01))
        y, workspace = (native.aligned(np.zeros(1 << 20, np.uint8)) for _ in range(2))
        addresses = (
            layer.x.ctypes.data,
            prepared.ctypes.data,
            y.ctypes.data,
            (workspace.ctypes.data, workspace.nbytes),
        )
        gpu.matmul(structures.gemm("cusparselt", format, "bf16", 64, 64, shared, 0.01), *addresses, CAPTURING)
        with pytest.raises(bindings.LibraryError, match=f"no plan for {other} tokens"):
            gpu.matmul(structures.gemm("cusparselt", format, "bf16", 64, 64, other, 0.01), *addresses, CAPTURING)
        made = y[: shared * 64 * 2].view(DTYPES["bf16"]).reshape(shared, 64).astype(np.float32)
        np.testing.assert_allclose(made, layer.expected(0.01, False, False), rtol=2**-7, atol=2e-2)


def test_errors_of_shapes_that_a_library_rejects_name_what_works(gpu: bindings.Context) -> None:
    for kernel, format, fragment in (
        ("cusparselt", "bf16", r"multiples of 16: \[100, 200\] would fit as \[112, 208\]; use the skinny"),
        ("cusparselt", "fp8", r"multiples of 32: \[100, 200\] would fit as \[128, 224\]"),
        ("cublaslt", "fp8", r"multiples of 16: \[100, 200\] would fit as \[112, 208\]"),
    ):
        with pytest.raises(bindings.LibraryError, match=fragment) as caught:
            gpu.weight_bytes(structures.gemm(kernel, format, "bf16", 100, 200))
        assert caught.value.status == "misaligned"
    with pytest.raises(bindings.LibraryError, match="cuSPARSELt writes bf16 for bf16 weights, not fp16"):
        gpu.plan(structures.gemm("cusparselt", "bf16", "fp16", 64, 64, 8))


def test_gpu_without_sparse_tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        bindings.LibraryError, match=r"Stand-in has compute capability 7\.5: .* begin at 8\.0"
    ) as caught:
        open_gpu(monkeypatch, sm=75)
    assert caught.value.status == "SM unsupported"


def test_fp8_before_ada(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = open_gpu(monkeypatch, sm=80)
    for kernel in structures.KERNELS:
        with pytest.raises(bindings.LibraryError, match=r"fp8 needs compute capability 8\.9 .* has 8\.0; use int8"):
            gpu.weight_bytes(structures.gemm(kernel, "fp8", "bf16", 64, 64))


def test_compressed_weight_of_another_gpu_or_version(gpu: bindings.Context) -> None:
    problem = structures.gemm("cusparselt", "bf16", "bf16", 64, 64)
    stamp = c_api.get_stamp(gpu, problem)
    assert (stamp.sm, stamp.version) == (90, 801)
    c_api.check_stamp(gpu, problem, stamp)
    for field, value in (("sm", 89), ("version", 800)):
        wrong = c_api.Stamp.from_buffer_copy(stamp)
        setattr(wrong, field, value)
        with pytest.raises(bindings.LibraryError, match="prepare it again from the dense weight"):
            c_api.check_stamp(gpu, problem, wrong)


def test_memory_that_runs_out_while_compressing_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = open_gpu(monkeypatch)
    used = bindings.load().stand_in_used
    before = used()
    set_environment(monkeypatch, "STAND_IN_MEMORY", "30000")
    with pytest.raises(bindings.LibraryError, match="cudaMalloc of compression scratch: out of memory") as caught:
        Layer("bf16", 128, 128, 8).prepare(gpu, "cusparselt")
    assert caught.value.status == "out of memory"
    Layer("bf16", 64, 64, 8).prepare(gpu, "cusparselt")
    assert used() == before
    gpu.close()
    assert used() < before


def test_two_contexts_are_apart(gpu: bindings.Context) -> None:
    other = bindings.Context(0)
    problem = Layer("bf16", 64, 64, 16).problem("cusparselt")
    other.set_algorithm(problem, (2, 1) + (0,) * 6)
    assert gpu.algorithm(problem)[0] == 0
    other.close()
    assert ctypes.c_void_p.from_buffer(other._handle).value is None
