"""A machine with a GPU measures, one without predicts, and nothing mixes the two. The GPU is the tests' stand-in, the
times are made up; what is tested is who asks for them, what is kept, and what the engine then runs."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.checkpoint import LayerFacts
from builder.config import EngineConfig
from builder.engines import measured_tactics, registry
from builder.engines.torch_backend.linears import Kernels
from builder.pipeline import layer_selection
from plugins.autotune import choice, tactics, tuner
from plugins.common.errors import UserError
from plugins.common.linear_shape import LinearShape
from plugins.common.patterns import OF_EIGHT, Pattern, keep_and_group, skinny_kernel
from plugins.common.processor import processor
from plugins.common.progress import Progress
from plugins.libtwofour import bindings, structures
from plugins.linear.factory import build_linear
from plugins.sparsity.torch_packing import pack
from tests.support.models import random_model
from tests.support.stand_in_gpu import by_kernel, use_machine, use_times

UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
CONFIG = EngineConfig(max_batch_size=2, max_seq_len=64, max_num_tokens=16)
FAST = {"cublaslt": 10.0, "torch": 11.0, "cusparselt": 8.0, "skinny": 5.0}
CUDA = torch.device("cuda", 0)
STORED = pack(torch.zeros(4, 8)).stored()  # what a 2:4 layer's tensors are known by


def checkpoint_of(directory: Path, pattern: Pattern) -> Path:
    """A folder of checkpoints whose model has two layers of `pattern`, of two shapes."""
    hf = random_model(directory / "checkpoints" / "hf", "Llama", hidden_size=64, intermediate_size=96)
    tensors, (keep, group) = load_file(hf / "model.safetensors"), keep_and_group(pattern)
    for name in (UP, DOWN):
        groups = tensors[f"{name}.weight"].view(-1, group)
        groups.scatter_(-1, groups.abs().topk(group - keep, largest=False).indices, 0)
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    (hf / "sparsity.json").write_text(json.dumps({"pattern": pattern, "method": "magnitude", "layers": [UP, DOWN]}))
    return hf.parent


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    return checkpoint_of(tmp_path, "2:4")


def sources(actual: dict[str, Any]) -> set[tuple[str, bool]]:
    """The file's source with every bucket's own word."""
    return {
        (actual["source"], bucket["measured"]) for layer in actual["layers"].values() for bucket in layer["buckets"]
    }


def test_torch_engine_is_tuned_on_a_gpu_and_obeys(
    checkpoints: Path, gpu: bindings.Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def us(bench: tuner.Bench, kernel: str, tokens: int) -> float:
        slow = kernel == "skinny" and bench.shape.in_features == 96  # down_proj: skinny loses, cuSPARSELt too
        return 12.0 if slow or (kernel == "cusparselt" and bench.shape.in_features == 96) else FAST[kernel]

    use_times(monkeypatch, us)
    registry.build("torch", checkpoints, tmp_path / "engine", CONFIG, "H100-SXM")
    read = tactics.read(tmp_path / "engine")
    actual = json.loads((tmp_path / "engine" / "tactics.json").read_text())
    assert sources(actual) == {("measured", True)}
    assert (read.source, read.gpu, read.versions["cusparselt"]) == ("measured", "Stand-in", 801)
    assert [(b.tokens, b.kernel, b.ratio) for b in read.layers[UP].buckets] == [
        (1, "skinny", 2.0), (8, "skinny", 2.0), (16, "skinny", 2.0),
    ]  # fmt: skip
    assert read.layers[DOWN].reason.startswith("stays dense: no sparse kernel is faster by 2% on Stand-in")
    assert read.layers["model.layers.0.self_attn.q_proj"].reason == "dense: the weight is not 2:4"
    assert list(read.layers)[-1] == "lm_head"
    assert not read.layers["lm_head"].buckets

    kernels = Kernels(actual, torch.bfloat16, CUDA)
    assert kernels.choices(UP, STORED) == [(1, "skinny"), (8, "skinny"), (16, "skinny")]
    assert kernels.choices(DOWN, STORED) == [(1, "cublaslt"), (8, "cublaslt"), (16, "cublaslt")]
    assert kernels.remarks == []
    problem = structures.gemm("cublaslt", "bf16", "bf16", 64, 96, 8)
    assert gpu.algorithm(problem) == read.layers[DOWN].buckets[1].algorithm


@pytest.mark.parametrize("pattern", OF_EIGHT)
def test_n_of_8_is_tuned_on_a_gpu_without_cusparselt_and_runs_its_kernel(
    gpu: bindings.Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pattern: Pattern
) -> None:
    """Above 64 tokens the layer has the dense kernel, as the reason states; what the engine makes of it multiplies."""
    monkeypatch.setattr(bindings, "version", lambda kernel: pytest.fail(f"{kernel} is not needed"))
    kernel = skinny_kernel(pattern)
    use_times(monkeypatch, by_kernel({"cublaslt": 10.0, "torch": 11.0, kernel: 8.0}))
    config = EngineConfig(max_batch_size=2, max_seq_len=64, max_num_tokens=128)
    registry.build("torch", checkpoint_of(tmp_path, pattern), tmp_path / "engine", config, "H100-SXM")
    actual = json.loads((tmp_path / "engine" / "tactics.json").read_text())
    assert sources(actual) == {("measured", True)}
    for name in (UP, DOWN):
        layer = actual["layers"][name]
        assert [(b["tokens"], b["kernel"], b["ratio"]) for b in layer["buckets"]] == [
            *((tokens, kernel, 1.25) for tokens in (1, 8, 16, 32, 64)),
            (128, "dense-cublaslt", None),
        ]
        assert layer["reason"].startswith(f"{pattern} is faster on Stand-in: 1.25x at 1, 1.25x at 8")
        assert layer["reason"].endswith("; dense at 128")

    kernels, stored = Kernels(actual, torch.bfloat16, CUDA), load_file(tmp_path / "engine" / "model.safetensors")
    for name in (UP, DOWN):
        own = {key.rpartition(".")[2]: tensor for key, tensor in stored.items() if key.startswith(f"{name}.")}
        choices = kernels.choices(name, own)
        assert choices is not None
        assert [kernel for _, kernel in choices] == [kernel] * 5 + ["cublaslt"]
        layer = build_linear(own, torch.bfloat16, torch.device("cpu"), choices)
        assert (layer.kernel, layer.pattern, layer.refused) == (f"{kernel} or cublaslt", pattern, None)
        problem = structures.gemm(kernel, "bf16", "bf16", layer.out_features, layer.in_features, 8)
        assert list(gpu.algorithm(problem)) == actual["layers"][name]["buckets"][1]["algorithm"]
    assert kernels.remarks == []


def test_without_a_gpu_the_torch_engine_is_timed_on_the_cpu(checkpoints: Path, tmp_path: Path) -> None:
    registry.build("torch", checkpoints, tmp_path / "engine", CONFIG, "L4")
    tactics = json.loads((tmp_path / "engine" / "tactics.json").read_text())
    assert sources(tactics) == {("measured", True)}
    assert tactics["device"]["name"] == tactics["gpu"] == processor()
    buckets = [bucket for layer in tactics["layers"].values() for bucket in layer["buckets"]]
    assert {bucket["kernel"] for bucket in buckets} <= {"cpu-2of4", "dense-cpu"}
    assert all(bucket["dense_us"] > 0 and bucket["sparse_us"] > 0 for bucket in buckets)
    assert measured_tactics.fingerprint(on_cpu=True)["kernels"]["threads"] >= 1


def test_without_a_gpu_and_a_library_everything_is_predicted(
    checkpoints: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured_tactics, "can_measure_cpu", lambda: False)
    registry.build("torch", checkpoints, tmp_path / "engine", CONFIG, "L4")
    tactics = json.loads((tmp_path / "engine" / "tactics.json").read_text())
    assert sources(tactics) == {("predicted", False)}
    assert (tactics["device"], tactics["gpu"]) == (None, "L4")
    assert measured_tactics.fingerprint() == {}
    assert measured_tactics.seconds_saved([], 8, "bfloat16") is None


def test_an_engine_for_its_logits_alone_needs_no_tuning(
    checkpoints: Path, gpu: bindings.Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The torch engine that stands in for TensorRT-LLM's when accuracy is measured, where nobody built libtwofour."""
    monkeypatch.setattr(bindings, "context", None)
    registry.build("torch", checkpoints, tmp_path / "engine", CONFIG, "L4", speed_matters=False)
    assert sources(json.loads((tmp_path / "engine" / "tactics.json").read_text())) == {("predicted", False)}


def test_predicted_or_foreign_tactics_on_a_gpu_are_reported(
    gpu: bindings.Context, checkpoints: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_times(monkeypatch, by_kernel(FAST))
    measured = registry.tactics(checkpoints / "hf", CONFIG, "L4")
    monkeypatch.setattr(measured_tactics, "gpus", tuple)
    predicted = registry.tactics(checkpoints / "hf", CONFIG, "L4", measured=False)
    from_a_cpu = registry.tactics(checkpoints / "hf", CONFIG, "L4")
    foreign = {**measured, "device": {**measured["device"], "name": "NVIDIA L4", "sm": 89}}
    older = {**measured, "versions": {**measured["versions"], "cusparselt": 900}}
    for given, fragment in (
        (predicted, "its kernels were chosen by prediction, not measured: build the engine again on this GPU"),
        (from_a_cpu, f"its kernels were timed on {processor()}, and this is Stand-in (SM 90): build the engine again"),
        (foreign, "its kernels were timed on NVIDIA L4 (SM 89), and this is Stand-in (SM 90): build the engine again"),
        (older, "its kernels were timed with cusparselt 900, and here is 801: build the engine again"),
    ):
        caplog.clear()
        kernels = Kernels(given, torch.bfloat16, CUDA)
        with caplog.at_level(logging.WARNING):
            assert kernels.choices("lm_head", {"weight": torch.empty(0)}) is None
            assert kernels.remarks == [], "a dense layer gives no remark"
            kernels.choices(UP, STORED)
            kernels.choices(DOWN, STORED)
        (remark,) = kernels.remarks
        assert remark.startswith(fragment)
        assert [record.message for record in caplog.records] == [remark]


def test_kernels_that_cannot_run_are_reported(monkeypatch: pytest.MonkeyPatch, gpu: bindings.Context) -> None:
    kernels = Kernels(None, torch.float32, CUDA)
    assert kernels.choices(UP, STORED) is None
    assert kernels.remarks[0].startswith("2:4 layers run dense: the kernels output fp16 or bf16, and")

    def missing(device: int) -> bindings.Context:
        raise UserError("no 'libtwofour.so': run `twofour plugins build`, or set TWOFOUR_LIBRARY")

    monkeypatch.setattr(bindings, "context", missing)
    kernels = Kernels(None, torch.bfloat16, CUDA)
    assert kernels.choices(UP, STORED) is None
    assert kernels.remarks[0].endswith("no 'libtwofour.so': run `twofour plugins build`, or set TWOFOUR_LIBRARY")


def test_gpu_whose_kernels_cannot_be_timed_is_refused(
    checkpoints: Path, gpu: bindings.Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It would silently run every 2:4 layer dense."""

    def refused(error: str, **changes: Any) -> None:
        with monkeypatch.context() as patched:
            for name, value in changes.items():
                patched.setattr(bindings, name, value)
            with pytest.raises(UserError) as caught:
                registry.build("torch", checkpoints, tmp_path / "engine", CONFIG, "H100-SXM")
        assert str(caught.value) == f"the 2:4 kernels of this machine's Stand-in cannot be timed: {error}"
        assert not (tmp_path / "engine" / "engine.json").exists()

    def raises(error: str) -> Any:
        def call(*_: object) -> None:
            raise UserError(error)

        return call

    refused("cuSPARSELt 0.8.0 is too old: ...", version=raises("cuSPARSELt 0.8.0 is too old: ..."))
    refused("no 'libtwofour.so': ...", context=raises("no 'libtwofour.so': ..."))
    refused("Stand-in has compute capability 7.5: ...", context=raises("Stand-in has compute capability 7.5: ..."))


def test_memory_that_runs_out_while_timing_is_a_line(
    checkpoints: Path, gpu: bindings.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr(tuner, "Bench", full)
    with pytest.raises(
        UserError, match=r"GPU memory ran out while timing bf16 \[96, 64\]: free memory .*allocate 2 GiB\)"
    ):
        registry.tactics(checkpoints / "hf", CONFIG, "H100-SXM")


def test_a_model_without_2to4_layers_needs_no_kernels(gpu: bindings.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "context", None)
    head = LayerFacts(LinearShape(8, 8, "fp8", name="lm_head"), 0, 0, ())
    actual = measured_tactics.tactics([head], CONFIG, "bfloat16")
    assert (actual["source"], actual["device"]["name"], actual["layers"]["lm_head"]["buckets"]) == (
        "measured",
        "Stand-in",
        [],
    )
    wide = LayerFacts(LinearShape(8, 8, "fp32", 1.0, name=UP), 0, 0, ())
    reason = measured_tactics.tactics([wide], CONFIG, "float32")["layers"][UP]["reason"]
    assert reason == "stays dense: the model computes in float32, and the sparse kernels in 16 bit"


def test_selection_weighs_measured_times_where_there_are_any(docs_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two equal layers by the roofline, the measured table knows one that gains and one that does not."""
    layers = (LinearShape(96, 64, "fp8", 1.0, name=UP), LinearShape(64, 96, "fp8", 1.0, name=DOWN))
    load = SimpleNamespace(concurrency=(1, 16))
    context = SimpleNamespace(
        plan=SimpleNamespace(predicted={"gpu": "H100-SXM"}),
        recipe=SimpleNamespace(benchmark=SimpleNamespace(workloads=(load,))),
        model=docs_llama,
    )
    predicted = layer_selection._seconds_saved(context, layers)
    assert min(predicted.values()) > 0, "launches bound both, so that bytes decide"

    asked = []

    def tune(shapes: dict[str, LinearShape], buckets: tuple[int, ...], progress: Progress, out: str) -> dict[str, Any]:
        asked.append((list(shapes), buckets, out))
        times = {UP: {"cublaslt": 20.0, "skinny": 13.0}, DOWN: {"cublaslt": 10.0, "skinny": 11.0}}
        made = {name: choice.choose(16, [choice.Timing(k, us) for k, us in times[name].items()]) for name in shapes}
        return {"layers": {name: {"buckets": [bucket]} for name, bucket in made.items()}}

    use_machine(monkeypatch)
    monkeypatch.setattr(bindings, "version", lambda kernel: 801)
    monkeypatch.setattr(tuner, "tune", tune)
    measured_tactics._whole_layers.cache_clear()
    assert layer_selection._seconds_saved(context, layers) == {UP: pytest.approx(7e-6), DOWN: 0.0}
    assert asked == [([UP, DOWN], (16,), "bf16")], "timed once, at the workload's decode batch"


def test_stage_keys_change_with_what_times_depend_on(
    gpu: bindings.Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "libtwofour.so"
    monkeypatch.setenv("TWOFOUR_LIBRARY", str(file))
    file.write_bytes(b"one")
    first = measured_tactics.fingerprint()
    assert (first["kernels"]["gpu"], first["kernels"]["cusparselt"]) == ("Stand-in", 801)
    assert measured_tactics.fingerprint() == first
    file.write_bytes(b"two")
    assert measured_tactics.fingerprint() != first
    file.unlink()
    assert "twofour plugins build" in measured_tactics.fingerprint()["kernels"]["none"]
