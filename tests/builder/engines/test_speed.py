"""The measuring commands for a GPU machine, tested on a CPU: what they build, compare and print without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernels import gemm
from benchmarks.kernels.model_shapes import MODELS, Model
from builder.engines.torch_backend import benchmark
from builder.engines.torch_backend import decoder as torch_model
from plugins.autotune.choice import Timing
from plugins.autotune.timing import Time
from plugins.common.errors import UserError
from plugins.common.linear_shape import LinearShape
from plugins.libtwofour import bindings
from plugins.linear.kernel_linear import DENSE
from plugins.sparsity import skinny_layout

CPU = torch.device("cpu")
TINY = Model(128, 256, 2, 1, 2, 512, head_dim=64)


class DenseKernels:
    """The engine's choice of kernels on a GPU without tactics: ours, dense, for every quantized layer."""

    def __init__(self, *_: object) -> None:
        self.remarks: list[str] = []

    def choices(self, name: str, stored: dict[str, torch.Tensor]) -> object:
        return DENSE if "weight_scale" in stored else None


def test_sparse_twin_computes_what_the_dense_model_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_model, "Kernels", DenseKernels)
    with torch.inference_mode():
        decoder = benchmark.decoder_of(TINY.config(), "fp8", CPU, 96)
        steps = [benchmark.prefill_step(decoder, 96), benchmark.decode_step(decoder, 3, 8)]
        before = [step() for step in steps]
        shapes = benchmark.shapes_of(decoder)
        assert shapes["256x128"] == LinearShape(256, 128, "fp8")
        buckets = [{"tokens": 64, "kernel": "skinny"}, {"tokens": 2048, "kernel": "dense-cublaslt"}]
        benchmark.make_sparse(decoder, {"layers": {key: {"buckets": buckets} for key in shapes}})
        layer = decoder.blocks[0].mlp.up_proj
        assert (layer.sparse, layer.kernel) == (True, "skinny or cublaslt")
        assert all(torch.equal(step(), ids) for step, ids in zip(steps, before, strict=True))
    assert before[0].shape == (1,)
    assert before[1].shape == (3,)


def test_speedups_compare_only_points_that_both_have() -> None:
    results = {
        "fp8-2of4": {"decode_us": {"1": 50.0, "8": 60.0}, "prefill_us": {"2048": 10.0}},
        "fp8": {"decode_us": {"1": 75.0, "8": 84.0, "64": 1.0}, "prefill_us": {}},
        "bf16": {"decode_us": {"8": 150.0}, "stopped": "out of time before batch 64"},
    }
    assert benchmark.speedups(results) == {
        "decode_us over fp8": {"1": 1.5, "8": 1.4},
        "prefill_us over fp8": {},
        "decode_us over bf16": {"8": 2.5},
        "prefill_us over bf16": {},
    }


def test_row_of_the_kernel_table(monkeypatch: pytest.MonkeyPatch) -> None:
    def timer(bench: object, kernel: str, tokens: int) -> Timing:
        if kernel == "cusparselt":
            raise UserError("cuSPARSELt 0.8.0 is too old")
        return Timing(kernel, {"cublaslt": 20.0, "torch": 18.0, "skinny": 12.0}[kernel])

    monkeypatch.setattr(gemm, "error_of", lambda bench, kernel, tokens: {"torch": 2e-4, "skinny": 1e-4}[kernel])
    bench = SimpleNamespace(shape=LinearShape(14336, 4096, "fp8"))
    ceilings = gemm.Ceilings(3e12, {"fp8": 1.4e15})
    row = gemm.row(bench, 8, ceilings, peers=False, timer=timer)
    assert row["kernels_us"] == {"cublaslt": 20.0, "torch": 18.0, "skinny": 12.0}
    assert row["left_out"] == {"cusparselt": "cuSPARSELt 0.8.0 is too old"}
    assert (row["dense"], row["sparse"], row["kept"], row["ratio"]) == ("torch", "skinny", "skinny", 1.5)
    moved = 14336 * 4096 * 0.625 + 8 * (4096 + 2 * 14336)
    assert row["gb_s"] == pytest.approx(moved / 12e-6 / 1e9, rel=1e-3)
    assert (row["limit"], row["share"]) == ("memory", pytest.approx(moved / 12e-6 / 3e12, rel=1e-3))
    named = {"model": "llama-3.1-8b", "layer": "gate_proj", "format": "fp8", "tokens": 8, **row}
    assert " 1.50x" in gemm.line(named)
    assert len(gemm.line(named)) <= len(gemm.HEADER)
    nothing = {**named, "sparse": None}
    assert gemm.line(nothing).endswith("no 2:4 kernel")


def test_large_products_are_held_against_the_math_ceiling() -> None:
    speeds = gemm.speeds(LinearShape(28672, 8192, "fp8"), 4096, 1e-3, gemm.Ceilings(3e12, {"fp8": 1.4e15}))
    assert (speeds["limit"], speeds["tflops"]) == ("math", pytest.approx(2 * 4096 * 28672 * 8192 / 1e-3 / 1e12, 1e-3))


def test_shapes_are_the_published_models() -> None:
    assert MODELS["llama-3.1-8b"].layers("fp8") == [
        LinearShape(6144, 4096, "fp8", name="qkv_proj"),
        LinearShape(4096, 4096, "fp8", name="o_proj"),
        LinearShape(28672, 4096, "fp8", name="gate_up_proj"),
        LinearShape(4096, 14336, "fp8", name="down_proj"),
    ]


def test_table_begins_with_the_largest_layers_and_keeps_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "measure_ceilings", lambda formats, device: gemm.Ceilings(3e12, {"fp8": 1.4e15}))
    monkeypatch.setattr(bindings, "context", lambda device: SimpleNamespace(info=lambda: SimpleNamespace(l2_bytes=1)))
    monkeypatch.setattr(gemm, "Bench", lambda shape, *_: SimpleNamespace(shape=shape))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    row = {"kernels_us": {"cublaslt": 20.0}, "dense": "cublaslt", "sparse": None, "ratio": None, "error": {}}
    row["peers_us"] = {"torch-cusparselt": 15.0, "torch-cutlass": "no fp8"}
    monkeypatch.setattr(gemm, "row", lambda *_: dict(row))
    kept: list[int] = []
    printed: list[str] = []
    late = iter([False, False, True])
    rows = gemm.table(
        "llama-3.1-8b", ["fp8"], [8], report=printed.append, expired=lambda: next(late),
        keep=lambda rows: kept.append(len(rows)),
    )  # fmt: skip
    assert [row["layer"] for row in rows] == ["gate_up_proj", "down_proj"]
    assert kept == [1, 2]
    assert printed[1].endswith("torch-cusparselt: 15.00 us\n" + " " * 26 + "torch-cutlass: no fp8")
    assert printed[-1] == "out of time before fp8 qkv_proj at 8 tokens"


@pytest.mark.parametrize("format", ["bf16", "int8", "fp8"])
def test_peers_that_cannot_run_report_why_in_a_line(format: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    bench = gemm.Bench(LinearShape(64, 64, format), CPU, 8, 1 << 20)
    assert (bench.channel_scales is not None) == (format == "int8")
    for peer in gemm.PEERS.values():
        reason = peer(bench, 8)
        assert isinstance(reason, str)
        assert reason.strip()
        assert "\n" not in reason


def test_engines_measurement_runs_to_its_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every part of it but the clock, on a small model and a CPU."""
    monkeypatch.setattr(torch_model, "Kernels", DenseKernels)
    monkeypatch.setitem(benchmark.MODELS, "tiny", TINY)
    monkeypatch.setattr(benchmark, "PREFILL", 64)
    monkeypatch.setattr(benchmark, "CONTEXT", 32)
    monkeypatch.setattr(bindings, "context", lambda device: None)
    monkeypatch.setattr(benchmark.tuner, "search_dense", lambda shapes, asked: None)
    buckets = [{"tokens": 8, "kernel": "skinny"}, {"tokens": 64, "kernel": "dense-cublaslt"}]
    monkeypatch.setattr(
        benchmark.tuner,
        "tune",
        lambda shapes, asked: {"layers": {key: {"buckets": buckets} for key in shapes}, "asked": asked},
    )
    monkeypatch.setattr(
        benchmark.timing, "measure", lambda call, copies, rounds, **_: call(0) is None or Time(4.0, 4.0, 4.0)
    )
    monkeypatch.setattr(benchmark, "eager_us", lambda call: call() is None or 8.0)
    kept: list[list[str]] = []
    actual = benchmark.run("tiny", 60, lambda actual: kept.append(list(actual["results"])), device="cpu")
    steps = [[], ["fp8"], ["fp8", "fp8-2of4"], ["fp8", "fp8-2of4", "bf16"]]
    assert kept == [steps[0], *(step for step in steps[1:] for _ in range(4))], "after each batch and each model"
    fp8 = actual["results"]["fp8"]
    assert fp8["dense_us"]["8"] == dict.fromkeys(
        ("cublaslt", "torch", "cublaslt, padded to 16", "cublaslt, padded to 32", "torch, padded to 16"), 4.0
    )
    assert set(fp8["dense_us"]["64"]) == {"cublaslt", "torch"}
    assert fp8["kernels"]["1"] == "not counted: there is no GPU here"
    assert actual["tactics"]["asked"] == (1, 8, 64, 64)
    assert actual["speedup"]["decode_us over fp8"] == {"1": 1.0, "8": 1.0, "64": 1.0}
    bytes_ = {name: result["weight_bytes"] for name, result in actual["results"].items()}
    shapes = [(128, 128), (64, 128), (64, 128), (128, 128), (256, 128), (256, 128), (128, 256)]  # of a block
    assert bytes_["bf16"] - bytes_["fp8"] == 2 * sum(n * k for n, k in shapes), "two blocks at half the bytes"
    packed = 2 * sum(skinny_layout.packed_bytes(n, k, "fp8") for n, k in shapes)
    assert bytes_["fp8-2of4"] - bytes_["fp8"] == packed, "beside the dense weight: the tactics name both kernels"
    monkeypatch.setattr(benchmark.time, "monotonic", iter(range(0, 10_000, 40)).__next__)
    late = benchmark.run("tiny", 60, device="cpu")
    assert late["results"]["fp8"]["stopped"] == "out of time before batch 8"
    assert late["results"]["bf16"] == {"stopped": "out of time before it was made"}


@pytest.mark.parametrize(
    "module",
    [
        "benchmarks.kernels.gpu_suite",
        "benchmarks.kernels.gemm",
        "benchmarks.kernels.hybrid_times",
        "benchmarks.kernels.pattern_times",
        "builder.engines.torch_backend.benchmark",
    ],
)
def test_without_a_gpu_the_commands_end_with_a_line(module: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run([sys.executable, "-m", module], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_commands_need_no_pydantic() -> None:
    """The GPU machines have torch and transformers, but not everything that twofour asks for."""
    code = (
        "import sys\n"
        "for name in ('pydantic', 'ml_dtypes', 'modelopt', 'click', 'rich', 'jinja2', 'hypothesis',\n"
        "             'accelerate', 'datasets', 'psutil'): sys.modules[name] = None\n"
        "import plugins.libtwofour.compiler, benchmarks.kernels.gpu_suite, benchmarks.kernels.gpu_machine\n"
        "import benchmarks.kernels.sanitizer, benchmarks.kernels.gemm, benchmarks.kernels.pattern_times\n"
        "import builder.engines.torch_backend.benchmark, tests.gpu.test_kernels, tests.gpu.test_kernels_of_8"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
