"""tactics.json and the tuner's choices: what is kept, what is reported, what is rejected. The times are invented."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from builder.engines.torch_backend.linears import Kernels
from plugins.autotune import choice, reuse, tactics, timing, tuner
from plugins.autotune.bench import workspace_of
from plugins.autotune.choice import Hybrid, Timing
from plugins.common.defaults import LEAST_GAIN
from plugins.common.errors import UserError
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import PATTERNS, TENSOR_CORE, Pattern, cpu_kernel
from plugins.libtwofour import bindings, structures
from plugins.sparsity.segments import Axis

SHAPE = LinearShape(4096, 14336, "fp8")


def bucket(tokens: int, **us: float) -> dict:
    return choice.choose(tokens, [Timing(kernel, time, (1, 2, 3)) for kernel, time in us.items()])


def test_fastest_sparse_kernel_is_kept_with_its_algorithm() -> None:
    chosen = bucket(8, cublaslt=20.0, torch=22.0, cusparselt=18.0, skinny=13.0)
    assert chosen == {
        "tokens": 8,
        "kernel": "skinny",
        "dense_us": 20.0,
        "sparse_us": 13.0,
        "ratio": 1.5385,
        "measured": True,
        "algorithm": [1, 2, 3],
        "notes": [],
    }


def test_sparse_must_beat_the_best_dense_by_the_margin() -> None:
    assert bucket(512, cublaslt=100.0, torch=90.0, cusparselt=89.5)["kernel"] == "dense-cublaslt"
    assert bucket(512, cublaslt=100.0, torch=90.0, cusparselt=88.0)["kernel"] == "cusparselt"


def test_ratio_is_against_the_best_dense_not_against_ours() -> None:
    assert bucket(512, cublaslt=100.0, torch=90.0, cusparselt=45.0)["ratio"] == 2.0


def test_kernels_that_cannot_run_are_left_out() -> None:
    def timer(bench: object, kernel: str, tokens: int) -> Timing:
        if kernel == "cusparselt":
            raise UserError("in_features=36 is not a multiple of 32")
        return Timing(kernel, {"cublaslt": 10.0, "torch": 11.0, "skinny": 5.0}[kernel])

    bench = SimpleNamespace(shape=SHAPE)
    assert tuner.bucket_of(bench, 64, timer)["kernel"] == "skinny"
    assert tuner.bucket_of(bench, 65, timer)["kernel"] == "dense-cublaslt"  # the skinny kernel ends at 64

    def nothing(bench: object, kernel: str, tokens: int) -> Timing:
        raise UserError("no")

    with pytest.raises(UserError, match=r"no kernel ran at 8 tokens.*twofour doctor"):
        tuner.bucket_of(bench, 8, nothing)


def test_torchs_own_refusal_leaves_out_torch_alone() -> None:
    def timer(bench: object, kernel: str, tokens: int) -> Timing:
        if kernel == "torch":
            raise RuntimeError("")  # torch._int_mm wants multiples of 8
        return Timing(kernel, 10.0, notes=("3 algorithms need more than 128 MiB of workspace",))

    actual = tuner.bucket_of(SimpleNamespace(shape=SHAPE), 128, timer)
    assert (actual["dense_us"], actual["sparse_us"]) == (10.0, 10.0)
    assert actual["notes"][1] == "cusparselt: 3 algorithms need more than 128 MiB of workspace"

    def full(bench: object, kernel: str, tokens: int) -> Timing:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):  # of the whole layer's operands, not of one kernel
        tuner.bucket_of(SimpleNamespace(shape=SHAPE), 128, full)


def test_reasons_as_text() -> None:
    wins = [bucket(8, cublaslt=20.0, skinny=13.0), bucket(512, cublaslt=100.0, cusparselt=99.0)]
    assert choice.reason(wins, "H100") == "2:4 is faster on H100: 1.54x at 8 tokens; dense at 512"
    loses = [bucket(8, cublaslt=10.0, skinny=12.5), bucket(512, cublaslt=100.0, cusparselt=101.0)]
    assert choice.reason(loses, "L4") == (
        "stays dense: no sparse kernel is faster by 2% on L4; the best is 0.99x at 512 tokens"
    )
    assert choice.reason([bucket(8, cublaslt=10.0)], "L4") == "stays dense: no sparse kernel runs this shape on L4"


@pytest.mark.parametrize(
    "pattern", [pytest.param(p, marks=[] if p == TENSOR_CORE else [pytest.mark.slow]) for p in PATTERNS]
)
def test_a_cpu_times_the_kernel_of_the_pattern_and_holds_its_weight_once(pattern: Pattern) -> None:
    shapes = {"layer": LinearShape(64, 128, "int8", pattern=pattern)}
    timed = tuner.tune_cpu(shapes, buckets=(1, 4))["layers"]["layer"]
    assert {bucket["kernel"] for bucket in timed["buckets"]} <= {cpu_kernel(pattern), "dense-cpu"}
    assert all(bucket["sparse_us"] > 0 and bucket["dense_us"] > 0 for bucket in timed["buckets"])
    kernel = cpu_kernel(pattern)
    buckets = [bucket(1, **{"cpu-dense": 10.0, kernel: 5.0}), bucket(64, **{"cpu-dense": 10.0, kernel: 11.0})]
    assert [each["kernel"] for each in choice.hold_once(buckets)] == [kernel, kernel]
    entry = choice.entry(shapes["layer"], buckets, "a CPU")
    assert entry["reason"].startswith(f"{pattern} is faster on a CPU: 2.00x at 1 tokens; {pattern} regardless")


@pytest.mark.parametrize("axis", ["rows", "inputs"])
def test_a_cpu_times_both_parts_of_a_layer_in_one_call(axis: Axis) -> None:
    whole = LinearShape(256, 256, "int8", pattern=TENSOR_CORE)
    timed = tuner.tune_cpu({"layer": Hybrid.of(whole, axis, 128)}, buckets=(1, 4))["layers"]["layer"]
    assert [bucket["tokens"] for bucket in timed["buckets"]] == [1, 4]
    pays = any(bucket["ratio"] >= LEAST_GAIN for bucket in timed["buckets"])
    parts = [[128, 256], [128, 256]] if axis == "rows" else [[256, 128], [256, 128]]
    assert timed["products"] == (parts if pays else None)
    for bucket in timed["buckets"]:
        assert bucket["dense_us"] > 0
        assert bucket["ratio"] == pytest.approx(bucket["dense_us"] / bucket["sparse_us"], rel=1e-3)
        assert pays or bucket["kernel"] == "dense-cpu"


def test_a_layer_in_part_that_does_not_pay_runs_dense_on_a_cpu() -> None:
    whole = LinearShape(256, 256, "int8", pattern=TENSOR_CORE)
    own = [bucket(1, **{"cpu-dense": 6.0, "cpu-2of4": 4.0})]
    dense = [Timing("cpu-dense", 10.0)]
    for both, kernel, products in ((9.0, "cpu-2of4", [[64, 256], [192, 256]]), (10.0, "dense-cpu", None)):
        buckets = choice.choose_hybrid(own, [Timing("cpu-2of4", both)], dense)
        entry = {**choice.entry(Hybrid.of(whole, "rows", 64), buckets, "a CPU"), "fraction": 0.25}
        assert (entry["buckets"][0]["kernel"], entry["products"]) == (kernel, products)
        kernels = Kernels({"layers": {"layer": entry}}, torch.bfloat16, torch.device("cpu"))
        assert kernels.runs_dense("layer") == (products is None)


def measured() -> dict:
    buckets = [bucket(8, cublaslt=20.0, skinny=13.0)]
    device = {"name": "H100", "sm": 90, "driver": "580.1", "clocks": {"sm": 1980.0}}
    return {
        "device": device,
        "source": "measured",
        "gpu": "H100",
        "versions": {"cusparselt": 801},
        "layers": {"model.layers.0.mlp.down_proj": choice.entry(SHAPE, buckets, "H100")},
    }


def test_file_round_trip(tmp_path: Path) -> None:
    tactics.write(measured(), tmp_path)
    assert not list(tmp_path.glob("*.partial"))
    read = tactics.read(tmp_path)
    assert read == tactics.read(tmp_path / "tactics.json")
    layer = read.layers["model.layers.0.mlp.down_proj"]
    assert (layer.out_features, layer.buckets[0].kernel, layer.buckets[0].algorithm) == (4096, "skinny", (1, 2, 3))
    assert read == tactics.Tactics.model_validate(measured())


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"source": "guessed"}, "source: Input should be 'measured' or 'predicted'"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
        ({"layers": {"a": {}}}, "layers.a.out_features: Field required"),
    ],
)
def test_damaged_file_is_named(tmp_path: Path, change: dict, fragment: str) -> None:
    (tmp_path / "tactics.json").write_text(json.dumps({**measured(), **change}))
    with pytest.raises(UserError, match=f"is not a tactics file: {fragment}; tune the engine again"):
        tactics.read(tmp_path)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="build the engine again with twofour engine"):
        tactics.read(tmp_path)


def test_tactics_of_another_gpu_or_library_are_not_trusted() -> None:
    here = {"libtwofour": 100, "cusparselt": 801, "cublaslt": 130100}
    ours = {**measured(), "versions": here}
    assert reuse.check_device(ours, "H100", 90, here) is None
    printed = reuse.check_device(ours, "L4", 89, here)
    assert printed == "its kernels were timed on H100 (SM 90), and this is L4 (SM 89): build the engine again here"
    newer = str(reuse.check_device(ours, "H100", 90, {**here, "cusparselt": 900}))
    assert newer == "its kernels were timed with cusparselt 801, and here is 900: build the engine again"
    unknown = str(reuse.check_device({**ours, "versions": {}}, "H100", 90, here))
    assert unknown.startswith("its kernels were timed with libtwofour of an unknown version, and here is 100")
    for change in ({"device": None}, {"source": "predicted"}):
        assert "chosen by prediction, not measured" in str(reuse.check_device({**ours, **change}, "H100", 90, here))


def test_algorithms_are_given_back_only_to_the_same_gpu_and_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, str, str, tuple[int, ...]]] = []

    def take(problem: structures.Gemm, algorithm: tuple[int, ...]) -> None:
        types = structures.FORMATS[problem.type], structures.FORMATS[problem.out_type]
        given.append((problem.tokens, *types, algorithm))

    fake = SimpleNamespace(
        info=lambda: SimpleNamespace(sm=90, cusparselt_version=801, cublaslt_version=130100),
        set_algorithm=take,
    )
    monkeypatch.setattr(bindings, "context", lambda device: fake)
    monkeypatch.setattr(bindings, "load", lambda: SimpleNamespace(twofour_version=lambda: 100))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    file = {**measured(), "versions": {"libtwofour": 100, "cusparselt": 801, "cublaslt": 130100}}
    assert reuse.apply(file, "fp16") is None
    assert given == [(8, "fp8", "fp16", (1, 2, 3))]  # of the problem that the engine will ask for
    assert reuse.apply({**file, "versions": {**file["versions"], "cusparselt": 802}})
    assert reuse.apply({**file, "device": {**file["device"], "sm": 89}})
    assert reuse.apply({**file, "device": None})
    assert len(given) == 1


def test_workspace_shrinks_with_memory_and_notes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def small(size: int, **kwargs: object) -> torch.Tensor:
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return empty(size, **kwargs)

    monkeypatch.setattr(torch, "empty", small)
    limit = 40 << 20
    workspace, notes = workspace_of(torch.device("cpu"), tuner.WORKSPACE)
    assert (workspace.nbytes, notes) == (32 << 20, ("only 32 MiB of GPU memory for a workspace",))
    limit = 100
    with pytest.raises(UserError, match="no GPU memory is left for a workspace"):
        workspace_of(torch.device("cpu"), tuner.WORKSPACE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_random_weights_have_exactly_two_nonzeros_a_group(dtype: torch.dtype) -> None:
    weight = timing.random_sparse(32, 256, dtype, torch.device("cpu"))
    nonzeros = (weight.float().view(32, 64, 4) != 0).sum(-1)
    assert weight.dtype == dtype
    assert bool((nonzeros == 2).all())


def test_clocks_are_those_of_the_device_that_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi numbers GPUs as the driver does, whatever CUDA_VISIBLE_DEVICES leaves."""
    asked = []

    def query(fields: str, device: str) -> str:
        asked.append(device)
        return "580.1, 1980, [N/A]\n"

    facts = {"name": "H100", "major": 9, "minor": 0}
    monkeypatch.setattr(timing, "query", query)
    for properties in (SimpleNamespace(**facts, uuid="b7a2-7"), SimpleNamespace(**facts)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, actual=properties: actual)
        assert timing.device_facts(1) == {"name": "H100", "sm": 90, "driver": "580.1", "clocks": {"sm": 1980.0}}
    assert asked == ["GPU-b7a2-7", "1"]


def test_copies_defeat_the_cache() -> None:
    assert timing.copies_to_fill(10 << 20, 50 << 20) * (10 << 20) > 100 << 20
    assert timing.copies_to_fill(1 << 30, 50 << 20) == 2


def test_model_of_the_file_needs_no_torch() -> None:
    code = "import sys, plugins.autotune.tactics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
