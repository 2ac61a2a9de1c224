"""The decode step's Triton kernels on a GPU: each beside its reference, and the whole step replayed from a graph."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.model_shapes import Model
from builder.engines.torch_backend.attention import Decode
from builder.engines.torch_backend.decoder import Decoder
from builder.engines.torch_backend.graph_kernels import count_kernels
from builder.engines.torch_backend.kv_cache import KVCache
from builder.engines.torch_backend.random_model import RandomWeights
from plugins.linear.hybrid_tensors import split
from plugins.sparsity.segments import Axis, Segments
from plugins.triton_kernels import ops, reference

pytest.importorskip("triton")

from tests.support.triton_kernels import cases, compare

DEVICE = torch.device("cuda", 0)
TWO_STEPS = {"float16": 2**-9, "bfloat16": 2**-6, "float8_e4m3fn": 2**-2, "int8": 1}
MODEL = Model(1024, 2816, 8, 2, 4, 4096)


@pytest.mark.parametrize("kernel", ops.LAUNCHES)
def test_kernel_computes_what_the_reference_does(kernel: str) -> None:
    torch.manual_seed(0)
    lengths = (500, 60)  # of attention in splits, and whole
    for name, arguments in (c for n in lengths for c in cases(torch.bfloat16, (8, 4, 128, n), rows=4, width=4096)):
        if name != kernel:
            continue
        placed = [value.to(DEVICE) if isinstance(value, torch.Tensor) else value for value in arguments]
        copies = [value.clone() if isinstance(value, torch.Tensor) else value for value in placed]
        pairs = [(getattr(ops, name)(*copies), getattr(reference, name)(*placed)), *zip(copies, placed, strict=True)]
        for out, expected in pairs:
            if isinstance(out, torch.Tensor):
                difference = compare(out, expected)
                assert difference["error"] <= TWO_STEPS.get(difference["dtype"], 0), (arguments[-1], difference)
                assert difference["differ"] <= 0.3, (arguments[-1], difference)


class InPart(RandomWeights):
    """Layers of which half is 2:4, of rows or of inputs."""

    def of(self, module: str) -> dict[str, torch.Tensor]:
        stored = super().of(module)
        if module.endswith("lm_head"):
            return stored
        weight = stored.pop("weight").cpu()
        axis: Axis = "inputs" if module.endswith(("o_proj", "down_proj")) else "rows"
        size = weight.shape[axis == "inputs"]
        return split(weight, Segments.split(axis, size, size // 2)) | stored


@torch.inference_mode()
@pytest.mark.parametrize("source", [RandomWeights, InPart])
@pytest.mark.parametrize("format", ["fp8", "bf16"])
def test_replayed_step_agrees_with_transformers_layers(format: str, source: type[RandomWeights]) -> None:
    """A layer that is 2:4 in part has one kernel more."""
    logits = {}
    for fused in (True, False):
        torch.manual_seed(1)  # the embedding is drawn with torch's own generator
        weights = source(MODEL.config(), format, DEVICE)
        model = Decoder(weights.config, weights, dtype=torch.bfloat16, device=DEVICE, positions=64, fused=fused)
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
        if fused:
            assert not any("plain torch" in remark for remark in model.remarks), model.remarks
            counts = count_kernels(step)
            assert isinstance(counts, dict), counts
            assert counts["kernel"] <= (16 if source is InPart else 12) * 4 + 8
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step()
        for _ in range(10):
            graph.replay()
            torch.testing.assert_close(out, eager, rtol=0, atol=0)
        logits[fused] = eager.float()
    assert (logits[True] - logits[False]).norm() <= 0.03 * logits[False].norm()
