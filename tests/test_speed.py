"""The measuring commands for a GPU machine, as far as a CPU goes: what they build, compare and say without one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gemm, gpu
from benchmarks.shapes import MODELS, Model
from builder.engines.torch import model as torch_model
from builder.engines.torch import speed
from plugins.errors import UserError
from plugins.kernel_linear import DENSE
from plugins.tuner import Shape, Timing

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
        decoder = speed.decoder_of(TINY.config(), "fp8", CPU)
        steps = [speed.prefill_step(decoder, 96), speed.decode_step(decoder, 3, 8)]
        before = [step() for step in steps]
        shapes = speed.shapes_of(decoder)
        assert shapes["256x128"] == Shape(256, 128, "fp8")
        buckets = [{"tokens": 64, "kernel": "skinny"}, {"tokens": 2048, "kernel": "dense-cublaslt"}]
        speed.make_sparse(decoder, {"layers": {key: {"buckets": buckets} for key in shapes}})
        layer = decoder._layers[0].mlp.up_proj
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
    assert speed.speedups(results) == {
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
    bench = SimpleNamespace(shape=Shape(14336, 4096, "fp8"))
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
    speeds = gemm.speeds(Shape(28672, 8192, "fp8"), 4096, 1e-3, gemm.Ceilings(3e12, {"fp8": 1.4e15}))
    assert (speeds["limit"], speeds["tflops"]) == ("math", pytest.approx(2 * 4096 * 28672 * 8192 / 1e-3 / 1e12, 1e-3))


def test_shapes_are_the_published_models() -> None:
    assert MODELS["llama-3.1-8b"].layers() == {
        "qkv_proj": (6144, 4096),
        "o_proj": (4096, 4096),
        "gate_up_proj": (28672, 4096),
        "down_proj": (4096, 14336),
    }


def test_steps_survive_each_other() -> None:
    said: list[str] = []

    def breaks() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    failed = gpu.step("tables", breaks, said.append)
    assert failed["error"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert gpu.step("tests", lambda: 3, said.append)["result"] == 3
    assert said[0] == "== tables"


def test_gpu_tests_are_found_and_run_without_pytest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "test_captured_products_replay_bit_for_bit" in gpu.test_names()
    source = "def test_good() -> None:\n    pass\n\ndef test_bad() -> None:\n    assert 1 == 2, 'why'\n"
    (tmp_path / "test_some.py").write_text(source)
    monkeypatch.setattr(gpu, "TESTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "_alive", lambda: True)
    assert gpu.test_names() == ["test_good", "test_bad"]
    assert gpu.run_tests(["test_good", "test_bad"], tmp_path / "out.json") == 1
    outcomes = json.loads((tmp_path / "out.json").read_text())
    assert outcomes == {"test_good": "passed", "test_bad": "failed: AssertionError: why (line 5)"}


@pytest.mark.parametrize("module", ["benchmarks.gpu", "benchmarks.gemm", "builder.engines.torch.speed"])
def test_without_a_gpu_the_commands_say_so_in_a_line(module: str) -> None:
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
        "for name in ('pydantic', 'ml_dtypes', 'modelopt', 'click', 'rich'): sys.modules[name] = None\n"
        "import plugins.build, benchmarks.gpu, benchmarks.gemm, builder.engines.torch.speed"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
