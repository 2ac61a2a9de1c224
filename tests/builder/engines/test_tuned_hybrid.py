"""Layers that are sparse in part, tuned on the stand-in GPU with made-up times: two products, one launch, or dense."""

from __future__ import annotations

import pytest
import torch

from builder.checkpoint import LayerFacts
from builder.config import EngineConfig
from builder.engines import measured_tactics
from builder.engines.torch_backend.linears import Kernels
from plugins.autotune import tuner
from plugins.common.linear_shape import LinearShape
from plugins.libtwofour import bindings, structures
from plugins.sparsity.segments import Segments
from plugins.sparsity.torch_packing import pack
from tests.support.stand_in_gpu import use_times

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
CONFIG = EngineConfig(max_batch_size=2, max_seq_len=64, max_num_tokens=16)
CUDA = torch.device("cuda", 0)
STORED = pack(torch.zeros(4, 8)).stored()  # what a 2:4 layer's tensors are known by


def in_part(name: str, rows: int, columns: int, segments: Segments | None, sparse: bool = True) -> LayerFacts:
    fraction = segments.fraction if segments else float(sparse)
    return LayerFacts(LinearShape(rows, columns, "fp8", fraction, name=name), 0, 0, (), segments)


def test_both_products_of_a_layer_that_is_2of4_in_part_are_timed(
    gpu: bindings.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gate (a third 2:4) and up (all of it) are one layer of two products; of down two thirds of the inputs are 2:4."""
    gate, head = UP.replace("up_proj", "gate_proj"), in_part("lm_head", 128, 64, None, sparse=False)
    split = {gate: Segments.split("rows", 96, 32), DOWN: Segments.split("inputs", 96, 64)}
    layers = [in_part(gate, 96, 64, split[gate]), in_part(UP, 96, 64, None), in_part(DOWN, 64, 96, split[DOWN]), head]

    def us(bench: tuner.Bench, kernel: str, tokens: int) -> float:
        launch = 1.0
        return launch + bench.shape.out_features * bench.shape.in_features / (2048 if kernel == "skinny" else 1024)

    use_times(monkeypatch, us)
    tactics = measured_tactics.tactics(layers, CONFIG, "bfloat16", fused=True, in_part=True)
    entries = tactics["layers"]
    assert entries[gate]["products"] == entries[UP]["products"] == [[128, 64], [64, 64]]
    assert entries[DOWN]["products"] == [[64, 64], [64, 32]]
    for name, both, dense in ((gate, (1 + 4) + (1 + 4), 1 + 12), (DOWN, (1 + 2) + (1 + 2), 1 + 6)):
        bucket = entries[name]["buckets"][0]
        assert (bucket["kernel"], bucket["sparse_us"], bucket["dense_us"]) == ("skinny", both, dense)
    assert entries[DOWN]["reason"].startswith(
        "2:4 in part (67%): dense time over that of both products on Stand-in: 1.17x"
    )

    fresh = bindings.Context(0)
    monkeypatch.setattr(bindings, "context", lambda device: fresh)
    kernels = Kernels(tactics, torch.bfloat16, CUDA)
    assert kernels.remarks == []
    group = "model.layers.0.mlp.gate_up_proj"
    assert kernels.choices(group, STORED) == kernels.choices(DOWN, STORED) == [(n, "skinny") for n in (1, 8, 16)]
    for name, sizes in ((gate, (128, 64)), (DOWN, (64, 64))):
        problem = structures.gemm("skinny", "fp8", "bf16", *sizes, 8)
        assert fresh.algorithm(problem)[:2] == tuple(entries[name]["buckets"][1]["algorithm"][:2])
    rest = structures.gemm("cublaslt", "fp8", "bf16", 64, 32, 8)
    assert fresh.algorithm(rest) == tuple(entries[DOWN]["buckets"][1]["rest_algorithm"])
    whole = measured_tactics.tactics(layers, CONFIG, "bfloat16", fused=True)["layers"]
    assert (whole[DOWN]["reason"], whole[DOWN]["products"]) == ("2:4 in part: not timed", None)


def test_both_parts_run_in_one_launch_where_that_is_the_fastest(
    gpu: bindings.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of gate and up a third of the rows, of down two thirds of the inputs."""
    gate = UP.replace("up_proj", "gate_proj")
    split = {gate: Segments.split("rows", 96, 32), DOWN: Segments.split("inputs", 96, 64)}
    layers = [in_part(gate, 96, 64, split[gate]), in_part(UP, 96, 64, split[gate]), in_part(DOWN, 64, 96, split[DOWN])]

    def us(bench: tuner.Bench, kernel: str, tokens: int) -> float:
        slow = kernel == "hybrid" and tokens == 1  # there two products are faster
        size = bench.shape.out_features * bench.shape.in_features
        return 1 + 9 * slow + size / {"skinny": 2048, "hybrid": 1536}.get(kernel, 1024)

    use_times(monkeypatch, us)
    tactics = measured_tactics.tactics(layers, CONFIG, "bfloat16", fused=True, in_part=True)
    fresh = bindings.Context(0)
    monkeypatch.setattr(bindings, "context", lambda device: fresh)
    kernels = Kernels(tactics, torch.bfloat16, CUDA)
    for name, sizes, sparse in (("model.layers.0.mlp.gate_up_proj", (192, 64), (64, 0)), (DOWN, (64, 96), (0, 64))):
        entry = tactics["layers"][DOWN if name == DOWN else gate]
        assert [bucket["kernel"] for bucket in entry["buckets"]] == ["skinny", "hybrid", "hybrid"]
        assert kernels.one_launch(name, STORED) == [(1, False), (8, True), (16, True)]
        assert not kernels.runs_dense(name)
        problem = structures.gemm("hybrid", "fp8", "bf16", *sizes, 8, sparse=sparse)
        assert list(fresh.algorithm(problem)) == list(entry["buckets"][1]["algorithm"])
    assert Kernels(None, torch.bfloat16, CUDA).one_launch(DOWN, STORED) == ()


def test_a_layer_whose_two_products_do_not_pay_runs_dense(
    gpu: bindings.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = UP.replace("up_proj", "gate_proj")
    cut = Segments.split("rows", 96, 32)
    layers = [in_part(gate, 96, 64, cut), in_part(UP, 96, 64, cut)]
    use_times(monkeypatch, lambda bench, kernel, tokens: 9.0 if kernel == "skinny" else 10.0)  # 9 + 10 us against 10
    tactics = measured_tactics.tactics(layers, CONFIG, "bfloat16", fused=True, in_part=True)
    entry = tactics["layers"][gate]
    assert (entry["products"], {bucket["kernel"] for bucket in entry["buckets"]}) == (None, {"dense-cublaslt"})
    assert entry["reason"].startswith("2:4 in part (33%): runs dense, as one product: dense time over that of both")
    kernels = Kernels(tactics, torch.bfloat16, CUDA)
    assert kernels.runs_dense("model.layers.0.mlp.gate_up_proj")
    assert not kernels.runs_dense(DOWN)


def whole(name: str, rows: int, columns: int) -> LinearShape:
    return LinearShape(rows, columns, "fp8", 1.0, name=name)


def test_the_second_product_of_a_half_is_timed(gpu: bindings.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launch, where time but for a launch of 2 us is as the bytes: of rows and of inputs."""
    use_times(
        monkeypatch,
        lambda bench, kernel, tokens: (
            2 + bench.shape.out_features * bench.shape.in_features / (2048 if kernel == "skinny" else 1024)
        ),
    )
    layers = [whole(UP, 128, 64), whole(DOWN, 64, 128), whole("model.layers.0.self_attn.k_proj", 32, 64)]
    seconds = measured_tactics.seconds_of_second_product(layers, 8, "bfloat16")
    assert seconds == {UP: pytest.approx(2e-6), DOWN: pytest.approx(2e-6)}, "32 rows have no half"
    assert measured_tactics.seconds_of_second_product(layers, 8, "float32") is None
