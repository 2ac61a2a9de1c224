"""The skinny kernels of 4:8, 5:8 and 6:8 on a GPU: against float64 (int8 exactly), packing, graphs, tuner and layers.

fp8 comes first, as in test_kernels.py.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.model_shapes import Model
from builder.engines.torch_backend.attention import Decode
from builder.engines.torch_backend.decoder import Decoder
from builder.engines.torch_backend.kv_cache import KVCache
from builder.engines.torch_backend.random_model import RandomWeights
from plugins.autotune import reuse, timing, tuner
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import OF_EIGHT, skinny_kernel
from plugins.libtwofour import bindings, structures, torch_ops
from plugins.linear.kernel_linear import KernelLinear, choices_of
from plugins.sparsity import skinny_layout_of8
from plugins.sparsity.torch_packing import pack, to_numpy
from tests.support import c_api
from tests.support.gpu_products import DEVICE, DTYPES, OPERATORS, PATTERN_OF, check, out_of, refused, weight_for

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=torch_ops.FORMATS.get)
each_kernel = pytest.mark.parametrize("kernel", [skinny_kernel(pattern) for pattern in OF_EIGHT])
MODEL = Model(1024, 2816, 8, 2, 4, 4096)


@each_dtype
@each_kernel
def test_tokens_from_1_to_64(kernel: str, dtype: torch.dtype) -> None:
    for tokens in (1, 2, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64):
        check(kernel, dtype, 256, 512, tokens, False, tokens % 2 == 0)


@each_dtype
@each_kernel
def test_shapes_off_the_blocks_with_every_epilogue(kernel: str, dtype: torch.dtype) -> None:
    for n, k in ((16, 16), (17, 272), (100, 528), (1000, 2000), (130, 4112)):
        for scaled, biased in ((False, False), (True, False), (False, True), (True, True)):
            check(kernel, dtype, n, k, 5, scaled, biased)


@each_dtype
@each_kernel
def test_shapes_of_real_models(kernel: str, dtype: torch.dtype) -> None:
    for n, k, tokens in ((14336, 4096, 1), (28672, 4096, 8), (4096, 14336, 33)):
        check(kernel, dtype, n, k, tokens, False, False)


@each_dtype
@each_kernel
def test_every_algorithm_gives_the_same_product(kernel: str, dtype: torch.dtype) -> None:
    """Staged and streamed, with each split of the inputs: int8 bit for bit, others within the order of their sums."""
    context, out = bindings.context(0), out_of(dtype)
    w = weight_for(kernel, 1000, 4096, dtype)
    packed, scale = torch_ops.prepare(w, kernel), 2.0**-9 if dtype.itemsize == 1 else 1.0
    for tokens in (1, 12, 40):
        x = timing.random_operand(tokens, 4096, dtype, DEVICE)
        problem = torch_ops.describe(kernel, x, 1000, out, scale)
        exact = x.double() @ w.double().T * scale
        size = x.double().abs() @ w.double().abs().T * scale
        algorithms = context.algorithms(problem)
        assert {algorithm[1] for algorithm in algorithms} == ({0, 1} if context.info().sm >= 90 else {0})
        results = []
        for algorithm in algorithms:
            context.set_algorithm(problem, algorithm)
            results.append(OPERATORS[kernel](x, packed, scale, None, None, 1000, out))
            epsilon = 2.0 ** (-10 if out == torch.float16 else -7)
            error = (results[-1].double() - exact).abs()
            assert bool((error <= epsilon * exact.abs() + 2.0**-17 * size + 1e-4).all()), (algorithm, tokens)
        if dtype == torch.int8:
            assert all(torch.equal(result, results[0]) for result in results)


@each_dtype
@each_kernel
def test_packing_on_the_device_is_numpys_and_inverts(kernel: str, dtype: torch.dtype) -> None:
    w, pattern, format = weight_for(kernel, 70, 528, dtype), PATTERN_OF[kernel], torch_ops.FORMATS[dtype]
    packed = torch_ops.prepare(w, kernel)
    assert torch.equal(packed.cpu(), torch.from_numpy(skinny_layout_of8.pack(to_numpy(w), format, pattern)))
    unpacked = torch.empty_like(w)
    problem = structures.gemm(kernel, format, "bf16", 70, 528)
    c_api.unpack_weight(bindings.context(0), problem, packed.data_ptr(), unpacked.data_ptr())
    torch.cuda.synchronize()
    assert torch.equal(unpacked.view(torch.uint8), w.view(torch.uint8))


@each_dtype
@each_kernel
def test_empty_groups_and_negative_zeros_change_nothing(kernel: str, dtype: torch.dtype) -> None:
    w, x = weight_for(kernel, 256, 512, dtype).float(), timing.random_operand(11, 512, dtype, DEVICE)
    empty = torch.rand(256, 64, 1, device=DEVICE) < 0.3
    w = (w.view(256, 64, 8).masked_fill(empty, 0) * (torch.rand(256, 64, 8, device=DEVICE) < 0.7)).view(256, 512)
    negative = torch.where(w == 0, -torch.zeros_like(w), w)
    out, scale = out_of(dtype), 2.0**-9 if dtype.itemsize == 1 else 1.0
    y = [
        OPERATORS[kernel](x, torch_ops.prepare(v.to(dtype), kernel), scale, None, None, 256, out) for v in (w, negative)
    ]
    assert torch.equal(*y)
    exact = x.double() @ w.double().T * scale
    assert bool(((y[0].double() - exact).abs() <= 2.0**-7 * exact.abs() + 1e-2).all())


@each_kernel
def test_weight_that_breaks_the_pattern_is_named(kernel: str) -> None:
    w, keep = weight_for(kernel, 64, 128, torch.bfloat16), int(PATTERN_OF[kernel][0])
    w[9, 40:48] = 1
    message = refused(lambda: torch_ops.prepare(w, kernel))
    assert f"row 9, group 5 (inputs 40 to 47) has more than {keep} nonzeros" in message


@each_dtype
@each_kernel
def test_slices_of_wider_matrices(kernel: str, dtype: torch.dtype) -> None:
    out, weight = out_of(dtype), torch_ops.prepare(weight_for(kernel, 512, 1024, dtype), kernel)
    scale = 2.0**-9 if dtype.itemsize == 1 else 1.0
    for tokens in (1, 3, 16, 64):
        wide_x, y = timing.random_operand(tokens, 1536, dtype, DEVICE), torch.ones(tokens, 768, device=DEVICE).to(out)
        expected = OPERATORS[kernel](wide_x[:, 512:].contiguous(), weight, scale, None, None, 512, out)
        torch_ops.linear_into(y[:, 256:], wide_x[:, 512:], weight, kernel, scale, None, None, False)
        assert torch.equal(y[:, 256:], expected)
        assert bool((y[:, :256] == 1).all()), (kernel, dtype, tokens)


@each_dtype
@each_kernel
def test_captured_products_replay_bit_for_bit(kernel: str, dtype: torch.dtype) -> None:
    prepared = torch_ops.prepare(weight_for(kernel, 512, 2048, dtype), kernel)
    x, arguments = timing.random_operand(12, 2048, dtype, DEVICE), (prepared, 1.0, None, None, 512, out_of(dtype))
    eager = OPERATORS[kernel](x, *arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = OPERATORS[kernel](x, *arguments)
    for _ in range(20):
        y.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, eager)


@each_dtype
@each_kernel
def test_a_search_writes_nothing_but_y_and_its_workspace(kernel: str, dtype: torch.dtype) -> None:
    """Every algorithm of a real layer's product, between guards; the weights stay as they are."""
    n, k, guard, out = 4096, 8192, 1 << 16, out_of(dtype)
    for tokens in (1, 40):
        x = timing.random_operand(tokens, k, dtype, DEVICE)
        prepared = torch_ops.prepare(weight_for(kernel, n, k, dtype), kernel)
        before = [tensor.view(torch.uint8).clone() for tensor in (x, prepared)]
        size = (64 << 20) + 4 * tokens * n
        place, y = (
            torch.full((bytes_ + 2 * guard,), 0xA5, dtype=torch.uint8, device=DEVICE)
            for bytes_ in (size, 2 * tokens * n)
        )
        problem = torch_ops.describe(kernel, x, n, out, 2.0**-9 if dtype.itemsize == 1 else 1.0)
        stream = torch.cuda.current_stream().cuda_stream
        where = (place.data_ptr() + guard, size)
        result = bindings.context(0).search(
            problem, x.data_ptr(), prepared.data_ptr(), y.data_ptr() + guard, where, stream=stream
        )
        torch.cuda.synchronize()
        assert result.tried > 1
        for tensor, kept in zip((x, prepared), before, strict=True):
            assert torch.equal(tensor.view(torch.uint8), kept)
        for guarded in (place, y):
            assert bool((guarded[:guard] == 0xA5).all())
            assert bool((guarded[-guard:] == 0xA5).all())


@pytest.mark.parametrize("pattern", OF_EIGHT)
def test_tuner_measures_and_its_tactics_are_taken_back(pattern: str) -> None:
    actual = tuner.tune({"layer": LinearShape(512, 1024, "bf16", pattern=pattern)}, buckets=(1, 64, 128))
    buckets = actual["layers"]["layer"]["buckets"]
    assert [bucket["sparse_us"] is not None for bucket in buckets] == [True, True, False]
    assert all(bucket["measured"] and bucket["dense_us"] > 0 for bucket in buckets)
    assert {bucket["kernel"] for bucket in buckets} <= {skinny_kernel(pattern), "dense-cublaslt"}
    assert reuse.apply(actual, "bf16") is None


@pytest.mark.parametrize("pattern", OF_EIGHT)
def test_layer_runs_the_packed_weight_and_above_64_tokens_the_dense_one(pattern: str) -> None:
    kernel = skinny_kernel(pattern)
    w = weight_for(kernel, 512, 512, torch.bfloat16)
    layer = KernelLinear(w, None, None, torch.bfloat16, choices_of(None, pattern))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens, expected in ((4, kernel), (64, kernel), (128, "cublaslt")):
        assert layer.kernel_for(tokens) == expected
        x = timing.random_operand(tokens, 512, torch.bfloat16, DEVICE)
        y = layer(x)
        assert torch.equal(compiled(x), y)
        torch.testing.assert_close(y.float(), x.float() @ w.float().T, rtol=2**-7, atol=0.3)


@each_kernel
def test_operators_pass_torchs_own_checks(kernel: str) -> None:
    checks = ("test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    x = timing.random_operand(64, 64, torch.bfloat16, DEVICE)
    packed = torch_ops.prepare(weight_for(kernel, 64, 64, torch.bfloat16), kernel)
    torch.library.opcheck(OPERATORS[kernel], (x, packed, 1.0, None, None, 64, torch.bfloat16), test_utils=checks)


class SixOfEight(RandomWeights):
    """Layers packed as an engine stores them."""

    def of(self, module: str) -> dict[str, torch.Tensor]:
        stored = super().of(module)
        if module.endswith("lm_head"):
            return stored
        weight = stored.pop("weight")
        sparse = timing.random_sparse(*weight.shape, weight.dtype, self.device, pattern="6:8")
        if weight.dtype == torch.bfloat16:
            sparse = sparse * 0.02
        return stored | pack(sparse, "6:8").stored()


@torch.inference_mode()
@pytest.mark.parametrize("format", ["fp8", "bf16"])
def test_replayed_decode_step_agrees_with_transformers_layers(format: str) -> None:
    logits = {}
    for fused in (True, False):
        torch.manual_seed(1)  # the embedding is drawn with torch's own generator
        weights = SixOfEight(MODEL.config(), format, DEVICE)
        model = Decoder(weights.config, weights, dtype=torch.bfloat16, device=DEVICE, positions=64, fused=fused)
        kernels = {layer.kernel for name, layer in model.linears.items() if "lm_head" not in name}
        assert kernels == {"skinny-6of8 or cublaslt"}
        cache = KVCache([(1.0, 1.0)] * 4, 6, 2, 128, kind="none", dtype=torch.bfloat16, device=DEVICE)
        torch.manual_seed(0)
        for tensor in (*cache.keys, *cache.values):
            tensor.normal_()
        table = torch.tensor([[3, 1], [2, 6], [5, 4]], dtype=torch.int32).cuda()
        tokens, positions = torch.tensor([[5], [9], [700]]).cuda(), torch.tensor([40, 3, 63]).cuda()

        def step() -> torch.Tensor:
            batch = Decode(cache, table, positions, 64, ragged=True)  # noqa: B023
            return model.logits(model.hidden(tokens, positions[:, None], batch)[:, 0])  # noqa: B023

        step()  # compares each operator with its reference, whose results it takes
        eager = step().clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for _ in range(10):
            graph.replay()
            torch.testing.assert_close(out, eager, rtol=0, atol=0)
        logits[fused] = eager.float()
    assert (logits[True] - logits[False]).norm() <= 0.03 * logits[False].norm()
